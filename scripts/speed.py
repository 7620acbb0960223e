"""How fast this machine trains and scores, beside what it could do by count; 10 minutes.

Where a range stands beside a figure, that is the median of --repeats. A --peer is a command that
trains something of the same size and prints a JSON line with images_per_second_without_validation
or images_per_second: it runs in alternation with our training; {image_size} and {batch_size} in it
are filled in. Nothing else should run meanwhile.
"""

import contextlib
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser, add_place_flags, experiment_folder
from ganomaly.config import ROOT, resolve
from ganomaly.errors import UserError, guard, leaving_at_once
from ganomaly.published import ORDER

SHAPES = [(64, 64), (64, 16), (128, 64)]  # image size and batch size, beside the peers
ON_A_GPU = [(256, 64)]  # too
GROWTH = {  # one factor at a time around the paper recipe; 256 px at width 16
    "image_size": [32, 64, 128, 256],
    "width": [16, 32, 64, 128],
    "batch_size": [1, 4, 16, 64, 256],
    "images": [100, 1000, 10_000, 100_000],
}
DEFAULT = {"image_size": 64, "width": 64, "batch_size": 16, "images": 1000}
RECIPES = ("paper", "calibrated")
PEAKS = ("peak_MB", "peak_GPU_MB")  # the second on a GPU only


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parts = ", ".join(PARTS)
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {parts} [all of them]")
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND", help="see above")
    parser.add_argument("--repeats", type=int, default=5, metavar="INT", help="of a median [5]")
    parser.add_argument("--seconds", type=float, default=3, metavar="FLOAT", help="of each [3]")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), metavar="INT",
        help="of a training [all cores]; scoring has the recipes' one",
    )  # fmt: skip
    parser.add_argument("--experiment", default="local", metavar="NAME", help="folder [local]")
    parser.add_argument("--job", help="internal: one measurement, in this process")
    add_place_flags(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats: {args.repeats} is not allowed; allowed: at least 1")
    if unknown := set(args.only or ()) - set(PARTS):
        raise UserError(f"--only {unknown.pop()!r}: no such part; there: {parts}")
    with leaving_at_once():
        from ganomaly import measure
        from ganomaly.device import use_device
        from ganomaly.files import write_atomic
        from ganomaly.provenance import provenance

    device = use_device(args.device)
    args.device = str(device)  # auto is decided once
    if args.job:
        given = json.loads(args.job)
        print(json.dumps(getattr(measure, given.pop("job"))(device=device, **given)))
        return 0
    # A part takes the place of the one that is there: each can be measured again by itself
    path = experiment_folder(args, args.experiment) / "speed.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in args.only or PARTS:
        begun = time.perf_counter()
        rows = PARTS[part](args, table)
        threads = args.threads if part in ("roof", "training", "growth", "profile") else 1
        origin = provenance(device, resolve({"dataset": "folder", "threads": threads}))
        table[part] = {"provenance": origin, "rows": rows}
        write_atomic(path, json.dumps(table, indent=2) + "\n")
        print(f"{part}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    text = markdown(table)
    write_atomic(path.with_suffix(".md"), text)
    print(text)
    return 0


# What is measured: the docstrings are the table's captions


def roof(args, table: dict) -> list[dict]:
    """The roof: billions of multiply-adds a second in products of large matrices, in float32 and in
    training's precision, and gigabytes a second from memory."""
    rows = []
    for n in dict.fromkeys([1, args.threads]):
        found = job(args, "roof", threads=n)
        rows.append({"threads": n, **{key: found[key] for key in ("float32", "amp", "GB")}})
    return rows


def training(args, table: dict) -> list[dict]:
    """Training at width 64, the paper recipe's networks, beside the peers: images a second,
    billions of multiply-adds an image, their share of the roof, peak memory."""
    rows, top = [], roof_of(table, args.threads, "amp")
    # Beside peers each figure is of a process of its own, in turn with theirs
    turns, windows = (args.repeats, 1) if args.peer else (1, args.repeats)
    for image_size, batch_size in SHAPES + ON_A_GPU * args.device.startswith("cuda"):
        shape = {"image_size": image_size, "batch_size": batch_size}
        commands = {}
        for peer in args.peer:
            for key, value in shape.items():
                peer = peer.replace(f"{{{key}}}", str(value))
            commands[peer] = []
        ours = []
        for _ in range(turns):
            ours.append(train_job(args, args.seconds, windows, **shape))
            for command, runs in commands.items():
                runs.append(process(shlex.split(command)))
        speed = [x for run in ours for x in run["images_per_second"]]
        count = multiply_adds(image_size=image_size)
        row = {**shape, "who": "ganomaly", "images_per_second": speed, "G_multiply_adds": count}
        row["of_the_roof"] = statistics.median(speed) * count / top
        rows.append({**row, **{key: of(ours, key) for key in PEAKS if key in ours[0]}})
        for command, runs in commands.items():
            best = "images_per_second_without_validation"
            theirs = [run.get(best) or run.get("images_per_second") for run in runs]
            if None in theirs:
                raise UserError(f"--peer {command}: printed no JSON line with images_per_second")
            times = statistics.median(speed) / statistics.median(theirs)
            who = " ".join(Path(word).name for word in shlex.split(command))
            row = {**shape, "who": who, "images_per_second": theirs, "we_are_faster": times}
            rows.append({**row, "peak_MB": of(runs, "peak_MB")})
    return rows


def growth(args, table: dict) -> list[dict]:
    """One factor at a time around 64 px, width 64, batch 16, 1,000 images; 256 px at width 16."""
    rows, runs = [], {}
    for factor, values in GROWTH.items():
        for value in values:
            slim = {"width": 16} if (factor, value) == ("image_size", 256) else {}
            changes = {} if DEFAULT[factor] == value else {**slim, factor: value}
            if (key := json.dumps(changes)) not in runs:
                runs[key] = train_job(args, args.seconds / 2, windows=1, **changes)
            run = runs[key]
            (speed,) = run["images_per_second"]
            told = {key: run[key] for key in PEAKS if key in run}
            told |= {"images_per_second": speed, "ms_an_image": 1000 / speed}
            shape = {} if factor in ("batch_size", "images") else changes
            count = multiply_adds(**shape)
            rows.append({"factor": factor, "value": value, "G_multiply_adds": count, **told})
    return rows


def profile(args, table: dict) -> list[dict]:
    """Where a run's time goes: milliseconds a training step by the paragraphs of training.py, logs
    and checkpoints at the recipe's intervals, on a GPU without the graph; decoding and scoring
    milliseconds an image."""
    found = {name: job(args, "profile", name=name, threads=args.threads) for name in RECIPES}
    phases = dict.fromkeys(phase for spent in found.values() for phase in spent)
    return [
        {"phase": phase, **{name: spent.get(phase) for name, spent in found.items()}}
        for phase in phases
        if phase not in ("peak_MB", "wall_seconds")
    ]


def scoring(args, table: dict) -> list[dict]:
    """One image, all scores, batch 1, one thread: milliseconds. The floor is the larger of
    multiply-adds over float32's roof and weights over memory's."""
    rows, flops, memory = [], roof_of(table, 1, "float32"), roof_of(table, 1, "GB")
    for name in RECIPES:
        found = job(args, "scoring", name=name, seconds=args.seconds, windows=args.repeats)
        count, weights = found["G_multiply_adds"], found["weights_GB"]
        floor = 1000 * max(count / flops, weights / memory)
        row = {"recipe": name, "median": found["median"], "p99": found["p99"], "floor": floor}
        rows.append({**row, "median_over_floor": statistics.median(row["median"]) / floor})
    return rows


def predict(args, table: dict, n: int = 1000, side: int = 900) -> list[dict]:
    """predict.py on a folder of JPEG photographs, the whole process, beside decoding and scoring of
    the same alone: seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        alone = job(args, "decode_and_score", folder=scratch, n=n, side=side)
        model, images, output = (f"{scratch}/{x}" for x in ("model.pt", "images", "scores.csv"))
        run = script(args, "predict", "--model", model, "--images", images, "--output", output)
    decode, score, whole = alone["decode"], alone["score"], run["wall_seconds"]
    row = {"images": n, "px": side, "decode": decode, "score": score, "predict": whole}
    return [{**row, "sum_over_predict": (decode + score) / whole, "peak_MB": run["peak_MB"]}]


def start(args, table: dict) -> list[dict]:
    """Seconds from the start of train.py to its first training step, and of all of it on the
    digits."""
    first = []
    for _ in range(args.repeats):
        begun = time.time()
        first.append(job(args, "first_step")["at"] - begun)
    with tempfile.TemporaryDirectory() as scratch:
        whole = script(args, "train", "--experiments-dir", scratch)["wall_seconds"]
    return [{"to_the_first_step": first, "make_train": whole}]


def benchmark(args, table: dict) -> list[dict]:
    """benchmark.py over 15 drawn categories of 60 images, 32 px, 100 steps each: seconds, over
    those of its training steps."""
    from ganomaly.measure import draw_category

    with tempfile.TemporaryDirectory() as scratch:
        for name in ORDER:
            draw_category(Path(scratch) / "images" / name, 60, 20)
        words = ["--data-root", f"{scratch}/images", "--experiments-dir", scratch]
        words += ["--steps", "100", "--image-size", "32"]
        whole = script(args, "benchmark", *words)["wall_seconds"]
        runs = [json.loads(path.read_text()) for path in Path(scratch).rglob("metrics.json")]
    steps = sum(of(runs, "train_seconds"))
    row = {"categories": len(runs), "training_seconds": steps, "benchmark_seconds": whole}
    row["images_per_second"] = of(runs, "images_per_second")
    return [{**row, "benchmark_over_training": whole / steps}]


PARTS = {
    function.__name__: function
    for function in (roof, training, growth, profile, scoring, predict, start, benchmark)
}


# Processes


def job(args, kind: str, **given) -> dict:
    """A function of ganomaly/measure.py in a process of its own."""
    return script(args, "speed", "--job", json.dumps({"job": kind, **given}))


def train_job(args, seconds: float, windows: int, images: int = 1000, **changes) -> dict:
    values = {"dataset": "folder", "threads": args.threads, **changes}
    return job(args, "training", values=values, n=images, seconds=seconds, windows=windows)


@functools.cache
def multiply_adds(**shape) -> float:
    """Billions of a training step, per image, whatever the batch."""
    from ganomaly.measure import training_count

    return training_count({"dataset": "folder", **shape})


def script(args, name: str, *words: str) -> dict:
    return process([sys.executable, f"scripts/{name}.py", *words, "--device", args.device])


def process(words: list[str]) -> dict:
    """Run a command: the JSON that it prints, its wall seconds, its peak memory in MB."""
    begun, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(words, stdout=out, stderr=err, cwd=ROOT)
        # Asked for while it runs: what the system tells at the end includes the process that forked
        while child.poll() is None:
            peak = max(peak, peak_of(child.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - begun
        out.seek(0)
        err.seek(0)
        printed, told = (file.read().decode(errors="replace") for file in (out, err))
    if child.returncode:
        raise UserError(f"{shlex.join(words)} failed: {(told.strip().splitlines() or [''])[-1]}")
    found: dict = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):
            parsed = json.loads(line)
            found = parsed if isinstance(parsed, dict) else found
    return {**found, "wall_seconds": seconds, "peak_MB": peak / 1024}


def peak_of(pid: int) -> int:
    """Peak resident memory of a running process in kB; 0 where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # it has just ended
        return 0


def of(runs: list[dict], key: str) -> list[float]:
    return [run[key] for run in runs]


def roof_of(table: dict, threads: int, key: str) -> float:
    for row in table.get("roof", {"rows": []})["rows"]:
        if row["threads"] == threads:
            return row[key]
    raise UserError(f"no roof of {threads} threads is measured yet; begin with --only roof")


# The table


def markdown(table: dict) -> str:
    lines = ["# Speed", ""]
    for part in (part for part in PARTS if part in table):
        origin, rows = table[part]["provenance"], table[part]["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"## {part.capitalize()}", "", " ".join(PARTS[part].__doc__.split()), ""]
        lines += ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
        lines += ["|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows]
        lines += ["", f"`{origin['command']}`, {origin['cpu']}, {origin['device']}, "
                  f"{origin['threads']} threads, torch {origin['torch']}", ""]  # fmt: skip
    return "\n".join(lines)


def cell(value) -> str:
    """Three digits of a number; the median of several, with their range."""
    if isinstance(value, list):
        middle = cell(statistics.median(value))
        return f"{middle} ({cell(min(value))} to {cell(max(value))})" if len(value) > 1 else middle
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value).replace("_", " ").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(guard(main))
