"""train.py on drawn images: what a run leaves, what it depends on, and what may interrupt it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ganomaly import data, load, paths
from ganomaly.config import SCORES, Config
from ganomaly.detector import Detector
from ganomaly.runs import evaluation, experiment, pipeline
from ganomaly.runs.results import EMPTY, METRICS, PROVENANCE
from ganomaly.runs.run import Recorder, Run

from .conftest import ROOT, add_masks, draw, draw_category, folder_of, same, train, train_words
from .outputs import contents, numbers, printed, read_csv, read_json, refusal


def test_a_run_leaves_what_the_contract_names(script, parts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = train_words(parts, tmp_path, "--steps=100", "--checkpoint-every=50")
    code, out, err = script("train", *words)
    folder = folder_of(tmp_path)
    first, tick = err.splitlines()[:2]
    start = "parts seed 42: recipe of the defaults, 14 images of 3x32"
    assert code == 0 and first.startswith(start)
    assert "million parameters, 100 steps of 4 in fp32 on cpu" in first
    assert "step 50/100" in tick and tick.endswith(" min left")
    for word in ("AUROC", "brightness", "mean image", "PCA-40", "best possible F1", "calling all"):
        assert word in out
    names = {path.name for path in folder.iterdir()}
    assert "samples.png" in names and not [n for n in names if "tmp" in n or "last" in n]
    metrics = read_json(folder / "metrics.json")
    assert set(metrics) == {*METRICS, *EMPTY} and set(metrics["scores"]) == set(Config().scores)
    assert {"version", *PROVENANCE} <= set(metrics["provenance"])
    assert (metrics["pixel_auroc"], metrics["auroc_brightness_raw"]) == (None, None)
    assert metrics["auroc"] == metrics["scores"]["latent"]
    assert metrics["found"].keys() == {"a_bar"} and metrics["found"]["a_bar"]["images"] == 5
    assert (metrics["n_train"], metrics["n_calibration"]) == (14, 10)
    log = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [50, 100]
    rows = read_csv(folder / "scores.csv")
    assert list(rows[0]) == ["path", "defect", "label", *Config().scores]
    assert rows[0]["path"] == "test/a_bar/000.png" and rows[0]["label"] == "1"
    assert rows[8]["defect"] == "good" and rows[8]["label"] == "0"
    # No path of this machine is in what git keeps
    for name in ("config.json", "metrics.json", "scores.csv"):
        assert str(parts) not in (folder / name).read_text()
    local = tmp_path / "local"
    assert (local / "results.csv").is_file() and not (local / "config.json").exists()
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    names = "discriminator adversarial contextual encoder generator comparator".split()
    shown = {*(f"loss/{name}" for name in names), *(f"auroc/{name}" for name in Config().scores)}
    assert set(tags["scalars"]) == shown | {"speed/images_per_second"}
    assert [e.step for e in events.Scalars("loss/contextual")] == [50, 100]
    assert [e.step for e in events.Images("reconstructions")] == [50, 100]
    assert set(tags["histograms"]) == {"latent/z", "latent/z - z_hat"}
    (config,) = events.Tensors("config/text_summary")
    assert b'"latent_dim": 8' in config.tensor_proto.string_val[0]


def test_training_never_sees_calibration_or_test_images_and_any_name_is_kept(tmp_path):
    root = draw_category(tmp_path / "images" / "parts")
    (root / "test/good/000.png").rename(root / "test/good" / os.fsdecode(b"sch\xf6n.png"))
    runs = [train(root.parent, tmp_path / "a")]
    assert b"test/good/sch\xf6n.png" in (runs[0] / "scores.csv").read_bytes()
    _, held_out = data.split_calibration(24, Config(category="parts"), "parts")
    rng = np.random.default_rng(5)
    files = paths.image_files(root / "train" / "good")
    for path in [files[i] for i in held_out] + sorted((root / "test").glob("*/*.png")):
        draw(path, rng, defective=True, size=64)
    runs.append(train(root.parent, tmp_path / "b"))
    first, second = map(load, runs)
    assert same(first, second)
    assert first.threshold != second.threshold  # they were calibrated with


def test_the_last_look_is_the_result_and_looking_changes_nothing(parts, tmp_path, monkeypatch):
    folder = train(parts, tmp_path / "a", "--checkpoint-every=2")
    metrics, scores = numbers(folder)
    rows = read_csv(folder / "curve.csv")
    assert [row.pop("step") for row in rows] == ["2", "4", "6"]
    assert rows[-1] == {name: f"{value:.6g}" for name, value in metrics["scores"].items()}
    assert (tmp_path / "a/local/curves.svg").is_file()
    monkeypatch.setattr(Recorder, "preview", lambda *_: None)
    assert numbers(train(parts, tmp_path / "b", "--checkpoint-every=2")) == (metrics, scores)


@pytest.mark.slow
def test_a_calibrated_run_has_every_score_and_figures_of_pixels(tmp_path):
    root = draw_category(tmp_path / "images" / "parts", n_train=40, n_good=8, n_bad=8)
    add_masks(root)
    more = "--corrupted=.5 --comparator-width=4 --normalise=exposure --score=calibrated".split()
    metrics, _ = numbers(train(root.parent, tmp_path, "--steps=200", "--width=8", *more))
    assert set(metrics["scores"]) == set(SCORES)
    assert metrics["auroc"] == metrics["scores"]["calibrated"] > 0.9
    assert metrics["pixel_auroc"] > 0.8 and metrics["aupro"] > 0.5
    # The bars make an image brighter; of what the network sees that is gone
    assert (metrics["auroc_brightness_raw"], metrics["auroc_brightness"]) == (1.0, 0.5)


STAGES = [
    (data, "read_images"), (os, "fsync"), (pipeline, "train"), (Recorder, "save"),
    (Detector, "calibrate"), (Run, "write_samples"), (Detector, "scores"),
    (evaluation, "figures"), (evaluation, "write_atomic"), (evaluation, "write_json"),
    (pipeline, "write_torch"), (experiment, "write_results"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, code",
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (torch.AcceleratorError("CUDA error: out of memory"), 2),
    ],
    ids=["ctrl-c", "disk", "gpu memory"],
)
def test_ctrl_c_and_other_troubles_in_every_phase(
    script, parts, trained, tmp_path, monkeypatch, error, code
):
    def fail(*args, **kwargs):
        raise error

    train(parts, tmp_path, "--seed=1")  # a result beside
    beside = contents(folder_of(tmp_path, seed=1))
    words = train_words(parts, tmp_path, "--checkpoint-every=2")
    for owner, stage in STAGES:
        with monkeypatch.context() as patch:
            patch.setattr(owner, stage, fail)
            got, _, err = script("train", *words)
        lines = [line for line in err.splitlines() if line and "seed 42: " not in line]
        assert got == code and len(lines) == 1 and "Traceback" not in err, (stage, err)
        assert lines[0].startswith(("error: ", "interrupted")), (stage, err)
    assert numbers(train(parts, tmp_path)) == numbers(folder_of(trained))
    assert contents(folder_of(tmp_path, seed=1)) == beside


def test_a_figure_that_fails_costs_no_model(script, parts, finished, tmp_path, monkeypatch):
    words, model, whole = train_words(parts, tmp_path), finished / "model.pt", numbers(finished)
    model.unlink()  # as in a clone: the old metrics do not make what is trained anew finished
    for empty in (np.empty, torch.empty):  # two errors of the same kind
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "pixel_figures", lambda *_, empty=empty: empty(2**57))
            assert "out of memory" in refusal(script("train", *words))
        assert not (finished / "metrics.json").exists()
    printed(script("predict", "--model", model, "--images", parts / "parts/test"))
    assert numbers(train(parts, tmp_path)) == whole


@pytest.mark.slow
def test_ctrl_c_of_the_real_process_and_the_same_command_give_the_same_bytes(parts, tmp_path):
    more = ["--steps=150", "--checkpoint-every=30"]
    whole, folder = train(parts, tmp_path / "whole", *more), folder_of(tmp_path / "stopped")
    words = [sys.executable, "scripts/train.py", *train_words(parts, tmp_path / "stopped", *more)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # A shell that runs pytest in the background has it ignore Ctrl-C, and its children too
    obeys = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(words, cwd=ROOT, preexec_fn=obeys, **pipes)
    while not (folder / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("interrupted: the same command")
    assert not (folder / "metrics.json").exists(), "stopped too late to show anything"
    assert numbers(train(parts, tmp_path / "stopped", *more)) == numbers(whole)
    curves = [(f / "curve.csv").read_text() for f in (folder, whole)]
    assert curves[0] == curves[1] and curves[0].count("\n") == 6
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(50, 151, 50))
