"""Measure how fast this machine trains and scores, and what it could reach at most.

A figure with a range is the median of --repeats. Nothing else should run on the machine meanwhile.

A --peer is the command of another training. It takes turns with ours. {image_size} and {batch_size}
in it are filled in. Its last line is JSON with images_per_second.
"""

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.benchmark import Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from ganomaly import cli
from ganomaly.config import EXPERIMENTS, ROOT, Config, load_config, resolve
from ganomaly.detector import Detector
from ganomaly.device import use_device, use_threads
from ganomaly.errors import UserError, guard
from ganomaly.files import write_atomic, write_json
from ganomaly.networks import build
from ganomaly.runs.provenance import provenance
from ganomaly.runs.results import Page, markdown
from ganomaly.training import AMP, resolve_amp, train

# Image size and batch size of trainings
SIZES = {"cpu": [(64, 64), (64, 16), (128, 64)], "cuda": [(64, 64), (64, 16), (128, 64), (256, 64)]}
WARM_UP = {"cpu": 2, "cuda": 6}  # steps before the timed ones; a GPU records its graph in them


def main(argv=None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="parts [all]")
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND", help="see above")
    parser.add_argument("--repeats", type=int, default=5, metavar="INT", help="of a median [5]")
    parser.add_argument("--seconds", type=float, default=3, metavar="FLOAT", help="of each [3]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="INT", help="[all]")
    parser.add_argument("--profile", action="store_true", help="only profile five training steps")
    cli.add_place_flags(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats: at least 1")
    args.device = use_device(args.device)
    folder = cli.experiment_folder(args)
    origin = provenance(args.device, resolve({"threads": args.threads}))
    if args.profile:
        profile(args, folder)
        return
    path = folder / "speed.json"
    # The parts that are not measured now stay as an earlier call measured them
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in args.only:
        table[part] = {"provenance": origin, "rows": PARTS[part](args)}
        write_json(path, table)
    text = markdown(page(table))
    write_atomic(path.with_suffix(".md"), text)
    print(text)


def roof(args) -> list[dict]:
    """The roof: billions of multiply-adds a second in products of large matrices, in float32 and in
    training's precision."""
    return [measure_roof(args.device, threads) for threads in sorted({1, args.threads})]


def measure_roof(device: torch.device, threads: int) -> dict:
    side = 8192 if device.type == "cuda" else 2048
    row = {"threads": threads}
    for name, dtype in (("float32", None), ("amp", AMP[resolve_amp("auto", device)])):
        a = torch.randn(side, side, device=device).to(dtype)
        timing = Timer("a @ a", globals={"a": a}, num_threads=threads)
        row[name] = side**3 / min(timing.timeit(1).median for _ in range(10)) / 1e9
    return row


def training(args) -> list[dict]:
    """Training of the paper recipe's networks at width 64, beside the peers: images a second;
    billions of multiply-adds of our step per image; the share of the machine's limit."""
    rows, top = [], measure_roof(args.device, args.threads)["amp"]
    for image_size, batch_size in SIZES[args.device.type]:
        shape = {"image_size": image_size, "batch_size": batch_size, "threads": args.threads}
        call = f"time_steps({str(args.device)!r}, {args.seconds}, {shape})"
        code = f"from scripts.speed import time_steps; {call}"
        trainings = [("ganomaly", [sys.executable, "-c", code], [])]
        for peer in args.peer:
            peer = peer.replace("{image_size}", str(image_size))
            words = shlex.split(peer.replace("{batch_size}", str(batch_size)))
            trainings.append((" ".join(Path(word).name for word in words), words, []))
        for _ in range(args.repeats):  # in turn, so that all see the same machine
            for _, words, speeds in trainings:
                speeds.append(images_per_second(words))
        ours, count = statistics.median(trainings[0][2]), multiply_adds(image_size)
        for who, _, speeds in trainings:
            median = statistics.median(speeds)
            row = {**shape, "who": who, "images_per_second": speeds, "G_multiply_adds": count}
            row |= {"of_the_roof": median * count / top, "we_are_faster": ours / median}
            rows.append(row)
    return rows


def scoring(args) -> list[dict]:
    """Milliseconds to compute all scores of one image on one thread. The floor is the image's
    multiply-adds divided by the roof in float32."""
    rows, top = [], measure_roof(args.device, 1)["float32"]
    for recipe in ("paper", "calibrated"):
        config = load_config(EXPERIMENTS / recipe / "config.json")
        scale = None if config.normalise == "none" else 1.0
        # Random weights are as fast as trained ones
        detector = Detector(build(config), config, args.device, scale)
        detector.calibrate(noise(config, 20))
        image = noise(config, 1)
        timing = Timer("d.scores(x)", globals={"d": detector, "x": image})
        runs = [timing.blocked_autorange(min_run_time=args.seconds) for _ in range(args.repeats)]
        medians = [1000 * run.median for run in runs]
        detector.scoring_networks = detector.networks  # torch's counter does not know packed layers
        with FlopCounterMode(display=False) as counter:
            detector.scores(image)
        floor = counter.get_total_flops() / 2 / top / 1e6  # a multiply-add is two flops
        over = statistics.median(medians) / floor
        row = {"recipe": recipe, "median": medians, "floor": floor, "median_over_floor": over}
        rows.append(row)
    return rows


# The docstring of a part is the caption of its table
PARTS = {"roof": roof, "training": training, "scoring": scoring}


def page(table: dict) -> Page:
    page: Page = ["Speed"]
    for part in (part for part in PARTS if part in table):
        origin, rows = table[part]["provenance"], table[part]["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
        page += [
            f"## {part.capitalize()}",
            " ".join(PARTS[part].__doc__.split()),
            ([column.replace("_", " ") for column in columns], cells),
            f"`{origin['command']}`, {origin['cpu']}, {origin['device']}, torch {origin['torch']}",
        ]
    return page


def cell(value) -> str:
    """Three digits of a number; the median of several, with their range."""
    if isinstance(value, list):
        return f"{cell(statistics.median(value))} ({cell(min(value))} to {cell(max(value))})"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def train_on_noise(steps: Iterator, device: torch.device, values: dict) -> None:
    """Train and keep nothing. Each training step takes one of `steps`; training ends with them."""
    config = resolve({"dataset": "folder", "steps": 10**9, "checkpoint_every": 10**9, **values})
    run = SimpleNamespace(load=lambda: None, log=lambda record: None)
    run.progress = SimpleNamespace(update=lambda: next(steps))
    use_threads(config.threads)
    with contextlib.suppress(StopIteration):
        train(config, noise(config, 1000), device, run)


def noise(config: Config, n: int) -> torch.Tensor:
    """uint8 (n, C, S, S)."""
    side = config.image_size
    return torch.randint(256, (n, config.channels, side, side), dtype=torch.uint8)


def time_steps(device_name: str, seconds: float, values: dict) -> None:
    """Print the images a second of at least three training steps, as a peer does."""
    device = use_device(device_name)

    def steps():
        yield from range(WARM_UP[device.type])
        begun, done = timer(), 0  # torch's timer waits for a GPU
        while done < 3 or time.perf_counter() < begun + seconds:
            yield
            done += 1
        print(json.dumps({"images_per_second": done * values["batch_size"] / (timer() - begun)}))

    train_on_noise(steps(), device, values)


def multiply_adds(image_size: int, **values) -> float:
    """Billions of a training step, per image, as torch counts them."""
    values |= {"image_size": image_size, "batch_size": 4, "amp": "fp32"}
    with FlopCounterMode(display=False) as counter:
        train_on_noise(iter(()), torch.device("cpu"), values)
    return counter.get_total_flops() / 2e9 / 4


def profile(args, folder: Path) -> None:
    """Print the operators that take most of five training steps; write folder/trace.json."""
    profiler = torch.profiler.profile()

    def steps():
        yield from range(WARM_UP[args.device.type])
        with profiler:
            yield from range(5)

    train_on_noise(steps(), args.device, {"batch_size": 64, "threads": args.threads})
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = f"self_{args.device.type}_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=20))
    print(f"written {folder / 'trace.json'}: ui.perfetto.dev or chrome://tracing opens it")


def images_per_second(words: list[str]) -> float:
    """Run the command of a training; the images_per_second of its last line."""
    printed = subprocess.check_output(words, text=True, errors="replace", cwd=ROOT)
    return json.loads(printed.splitlines()[-1])["images_per_second"]


if __name__ == "__main__":
    sys.exit(guard(main))
