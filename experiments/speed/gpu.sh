#!/usr/bin/env bash
# What to measure on a machine with a GPU, the most valuable first. Each part prints its seconds and
# the end of its log when it ends, so the script may be stopped at any time.
#
#     bash experiments/speed/gpu.sh IMAGES OUT
#
# IMAGES holds bottle, screw, transistor and, for the last part but one, MNIST. OUT takes the logs and
# the tables. PYTHON names an interpreter with the requirements. A rehearsal on a CPU:
#
#     DEVICE=cpu STEPS=10 MNIST_STEPS=10 SIZES=64 MORE_SEEDS=43 SPEED="--only roof" \
#         SHAPES=32,4,8 AMPS=bf16 bash experiments/speed/gpu.sh IMAGES OUT
set -u
images=$(realpath "$1") out=$(mkdir -p "$2" && realpath "$2")
cd "$(dirname "$0")/../.."
: "${DEVICE:=cuda}" "${STEPS:=3000}" "${MNIST_STEPS:=11800}" "${SIZES:=64 128 256}" "${MORE_SEEDS:=43 44}"
: "${SPEED:=--only roof training --seconds 1 --threads 1}" "${SHAPES:=256,64,64 64,16,64}"
: "${AMPS:=bf16 fp16}" # a CPU took over five minutes for ten steps in fp16
export PYTHON=${PYTHON:-$PWD/.venv/bin/python} DEVICE # make takes both from here

part() { # name, command
    local name=$1 start=$SECONDS
    shift
    "$@" >"$out/$name.log" 2>&1
    echo "== $name: exit code $?, $((SECONDS - start)) s"
    tail -n 25 "$out/$name.log"
    for table in experiments/local/gpu/"$name"/*.csv experiments/local/gpu/"$name"/*.json; do
        cp "$table" "$out/$name.${table##*.}" 2>/dev/null
    done
}

benchmark() { # experiment, recipe, further words of make
    local name=$1 recipe=$2
    shift 2
    part "$name" make benchmark RECIPE="$recipe" EXPERIMENT="local/gpu/$name" "$@"
}

sizes() { # seeds
    for size in $SIZES; do
        benchmark "calibrated_$size" calibrated DATASET=folder DATA_ROOT="$images" SEEDS="$1" \
            CATEGORIES="bottle screw transistor" ARGS="--image-size $size --steps $STEPS"
    done
}

part cuda_tests "$PYTHON" -m pytest -q -m cuda
sizes 42
part speed make speed EXPERIMENT=local/gpu/speed ARGS="$SPEED"
part draw "$PYTHON" -c "
from pathlib import Path
from ganomaly.data import MVTEC
from tests.conftest import draw_category
for i, name in enumerate(MVTEC):
    draw_category(Path('experiments/local/gpu/drawn', name), 240, 30, 50, seed=i)"
benchmark fifteen paper DATASET=mvtec DATA_ROOT=experiments/local/gpu/drawn ARGS="--steps $STEPS"
part variants "$PYTHON" experiments/speed/variants.py "$DEVICE" 1 $SHAPES
for amp in $AMPS; do
    benchmark "$amp" paper DATASET=folder DATA_ROOT="$images" CATEGORIES=bottle ARGS="--amp $amp --steps $STEPS"
done
benchmark mnist mnist DATA_ROOT="$images" ARGS="--steps $MNIST_STEPS"
sizes "$MORE_SEEDS"
