"""How fast this machine trains and scores, beside what it could do by count.

Where a range stands beside a figure, that is the median of --repeats. A --peer is a command that
trains something of the same size and prints a JSON line with images_per_second_without_validation
or images_per_second: it runs in turn with our training; {image_size} and {batch_size} in it are
filled in. Nothing else should run meanwhile.
"""

import contextlib
import copy
import json
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly import cli

# isort: split
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from ganomaly import config as configuration
from ganomaly.batches import Batches
from ganomaly.config import ROOT, Config, resolve
from ganomaly.detector import Detector
from ganomaly.device import use_device, use_threads
from ganomaly.errors import UserError, guard
from ganomaly.files import write_atomic
from ganomaly.networks import build, initialise
from ganomaly.runs.provenance import provenance
from ganomaly.runs.results import markdown_table
from ganomaly.training import AMP, resolve_amp, train

SHAPES = [(64, 64), (64, 16), (128, 64)]  # image size and batch size of trainings
ON_A_GPU = [(256, 64)]  # too
WARM_UP = {"cpu": 2, "cuda": 6}  # steps that choose kernels; on a GPU the graph is recorded, too
N_IMAGES = 1000  # of a training


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    parts = ", ".join(PARTS)
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {parts} [all of them]")
    parser.add_argument("--peer", action="append", default=[], metavar="COMMAND", help="see above")
    parser.add_argument("--repeats", type=int, default=5, metavar="INT", help="of a median [5]")
    parser.add_argument("--seconds", type=float, default=3, metavar="FLOAT", help="of each [3]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="INT", help="[all]")
    parser.add_argument("--experiment", default="local", metavar="NAME", help="folder [local]")
    parser.add_argument(
        "--profile", action="store_true",
        help="only profile some training steps: writes trace.json, for ui.perfetto.dev",
    )  # fmt: skip
    parser.add_argument("--job", nargs=2, help="internal: one measurement, in this process")
    cli.add_place_flags(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.threads < 1:
        raise UserError("--repeats, --threads: at least 1")
    if unknown := set(args.only or ()) - set(PARTS):
        raise UserError(f"--only {unknown.pop()!r}: no such part; there: {parts}")
    args.device = use_device(args.device)
    folder = cli.experiment_folder(args, args.experiment)
    if args.job:
        name, arguments = args.job
        print(json.dumps(JOBS[name](args.device, *json.loads(arguments))))
        return 0
    if args.profile:
        print(profile(args, folder))
        return 0
    # A part takes the place of the one that is there: each can be measured again by itself
    path = folder / "speed.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in args.only or PARTS:
        rows = PARTS[part](args, table)
        threads = args.threads if part in ("roof", "training") else 1
        origin = provenance(args.device, resolve({"dataset": "folder", "threads": threads}))
        table[part] = {"provenance": origin, "rows": rows}
        write_atomic(path, json.dumps(table, indent=2) + "\n")
    text = markdown(table)
    write_atomic(path.with_suffix(".md"), text)
    print(text)
    return 0


# The parts: their docstrings are the table's captions


def roof(args, table: dict) -> list[dict]:
    """The roof: billions of multiply-adds a second in products of large matrices, in float32 and in
    training's precision, and gigabytes a second from memory."""
    side, rows = 8192 if args.device.type == "cuda" else 2048, []
    for threads in dict.fromkeys([1, args.threads]):

        def seconds(a, b, threads=threads):
            timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads)
            return min(timer.timeit(1).median for _ in range(10))

        row = {"threads": threads}
        for name, dtype in (("float32", None), ("amp", AMP[resolve_amp("auto", args.device)])):
            a = torch.randn(side, side, device=args.device).to(dtype)
            row[name] = side**3 / seconds(a, a) / 1e9
        a = torch.randn(4 * side, 4 * side, device=args.device)
        rows.append({**row, "GB": a.nbytes / seconds(a, a[0]) / 1e9})
    return rows


def training(args, table: dict) -> list[dict]:
    """Training at width 64, the paper recipe's networks, beside the peers: images a second,
    billions of multiply-adds an image, their share of the roof."""
    rows, top = [], from_roof(table, args.threads, "amp")
    for image_size, batch_size in SHAPES + ON_A_GPU * (args.device.type == "cuda"):
        shape = {"image_size": image_size, "batch_size": batch_size}
        ours, theirs = [], {}
        for command in args.peer:
            command = command.replace("{image_size}", str(image_size))
            theirs[command.replace("{batch_size}", str(batch_size))] = []
        for _ in range(args.repeats):  # in turn, so that all see the same machine
            run = job(args, "time_steps", args.seconds, {**shape, "threads": args.threads})
            ours.append(run["images_per_second"])
            for command, speeds in theirs.items():
                run = process(shlex.split(command))
                best = run.get("images_per_second_without_validation")
                if (speed := best or run.get("images_per_second")) is None:
                    message = "printed no JSON line with images_per_second"
                    raise UserError(f"--peer {command}: {message}")
                speeds.append(speed)
        count = multiply_adds(image_size)
        row = {**shape, "who": "ganomaly", "images_per_second": ours, "G_multiply_adds": count}
        rows.append({**row, "of_the_roof": statistics.median(ours) * count / top})
        for command, speeds in theirs.items():
            who = " ".join(Path(word).name for word in shlex.split(command))
            times = statistics.median(ours) / statistics.median(speeds)
            row = {**shape, "who": who, "images_per_second": speeds, "we_are_faster": times}
            rows.append(row)
    return rows


def scoring(args, table: dict) -> list[dict]:
    """One image, all scores, batch 1, one thread: milliseconds. The floor is the larger of
    multiply-adds over float32's roof and weights over memory's."""
    rows, flops, memory = [], from_roof(table, 1, "float32"), from_roof(table, 1, "GB")
    for name in ("paper", "calibrated"):
        detector = untrained(name, args.device)
        image = noise(detector.config, 1)
        timer = Timer("d.scores(x)", globals={"d": detector, "x": image})
        median = [1000 * timer.blocked_autorange(min_run_time=args.seconds).median
                  for _ in range(args.repeats)]  # fmt: skip
        counted = copy.copy(detector)
        counted.fast = detector.networks  # the counter does not know packed layers
        with FlopCounterMode(display=False) as counter:
            counted.scores(image)
        weights = sum(p.nbytes for net in detector.networks.values() for p in net.parameters())
        floor = max(counter.get_total_flops() / 2e6 / flops, weights / 1e6 / memory)
        row = {"recipe": name, "median": median, "floor": floor}
        rows.append({**row, "median_over_floor": statistics.median(median) / floor})
    return rows


def start(args, table: dict) -> list[dict]:
    """Seconds from the start of train.py to its first training step, and of all of it on the
    digits."""
    first = []
    for _ in range(args.repeats):
        begun = time.time()
        first.append(job(args, "first_step")["at"] - begun)
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.time()
        script(args, "train", "--experiments-dir", scratch)
    return [{"to_the_first_step": first, "make_train": time.time() - begun}]


PARTS = {part.__name__: part for part in (roof, training, scoring, start)}


# Trainings


def train_through(steps: Iterator, device: torch.device, values: dict) -> None:
    """train() on noise, of which nothing is kept. Each step takes one of `steps`, which end it."""
    config = resolve(dict(dataset="folder", steps=10**9, checkpoint_every=10**9) | values)
    run = SimpleNamespace(load=lambda: None, log=lambda record: None)
    run.progress = SimpleNamespace(update=lambda: next(steps))
    use_threads(config.threads)
    with contextlib.suppress(StopIteration):
        train(config, noise(config, N_IMAGES), device, run)


def time_steps(device: torch.device, seconds: float, values: dict) -> dict:
    """Images a second, of three steps or more behind the warm-up."""
    found = {}

    def steps():
        yield from range(WARM_UP[device.type])
        wait_for(device)
        begun, done = time.perf_counter(), 0
        while done < 3 or time.perf_counter() < begun + seconds:
            yield
            done += 1
        wait_for(device)
        spent = time.perf_counter() - begun
        found["images_per_second"] = done * values["batch_size"] / spent

    train_through(steps(), device, values)
    return found


def multiply_adds(image_size: int, **values) -> float:
    """Billions of a training step, per image, as torch counts them."""
    values |= dict(image_size=image_size, batch_size=4, amp="fp32")
    with FlopCounterMode(display=False) as counter:
        train_through(iter(()), torch.device("cpu"), values)
    return counter.get_total_flops() / 2e9 / 4


def profile(args, folder: Path) -> str:
    """The operators that take most of five training steps; writes folder/trace.json."""
    on_gpu = args.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=kinds[: 1 + on_gpu])

    def steps():
        yield from range(WARM_UP[args.device.type])
        profiler.start()
        yield from range(5)
        wait_for(args.device)
        profiler.stop()

    train_through(steps(), args.device, {"batch_size": 64, "threads": args.threads})
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=20)
    return f"{table}\nwritten {folder / 'trace.json'}: ui.perfetto.dev or chrome://tracing opens it"


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def noise(config: Config, n: int) -> torch.Tensor:
    """uint8 (n, C, S, S)."""
    shape = (n, config.channels, config.image_size, config.image_size)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def untrained(recipe: str, device: torch.device) -> Detector:
    """A detector of random weights: as fast as any other."""
    config = configuration.load(ROOT / "experiments" / recipe / "config.json")
    networks = build(config)
    for network in networks.values():
        initialise(network, torch.Generator().manual_seed(0))
    detector = Detector(networks, config, device, None if config.normalise == "none" else 1.0)
    detector.calibrate(noise(config, 20))
    return detector


# Processes


def first_step(device: torch.device) -> dict:
    """When train.py, with nothing given, asks for its first batch."""
    found: dict = {}

    def asked(_):
        found["at"] = time.time()
        raise KeyboardInterrupt

    Batches.next = asked
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(SystemExit):
        sys.argv[1:] = ["--experiments-dir", scratch, "--device", str(device)]
        runpy.run_path(str(ROOT / "scripts/train.py"), run_name="__main__")
    return found


JOBS = {"time_steps": time_steps, "first_step": first_step}


def job(args, name: str, *arguments) -> dict:
    """One of JOBS in a process of its own."""
    return script(args, "speed", "--job", name, json.dumps(arguments))


def script(args, name: str, *words: str) -> dict:
    return process([sys.executable, f"scripts/{name}.py", *words, "--device", str(args.device)])


def process(words: list[str]) -> dict:
    """Run a command; returns the last JSON object that it prints on a line."""
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", cwd=ROOT)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise UserError(f"{shlex.join(words)} failed: {last}")
    found: dict = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            parsed = json.loads(line)
            found = parsed if isinstance(parsed, dict) else found
    return found


# The table


def from_roof(table: dict, threads: int, key: str) -> float:
    for row in table.get("roof", {"rows": []})["rows"]:
        if row["threads"] == threads:
            return row[key]
    raise UserError(f"no roof of {threads} threads is measured yet; begin with --only roof")


def markdown(table: dict) -> str:
    blocks = ["# Speed\n"]
    for part in (part for part in PARTS if part in table):
        origin, rows = table[part]["provenance"], table[part]["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[cell(row.get(column)) for column in columns] for row in rows]
        blocks += [
            f"## {part.capitalize()}\n",
            " ".join(PARTS[part].__doc__.split()) + "\n",
            markdown_table([column.replace("_", " ") for column in columns], cells),
            f"`{origin['command']}`, {origin['cpu']}, {origin['device']}, "
            f"{origin['threads']} threads, torch {origin['torch']}\n",
        ]
    return "\n".join(blocks)


def cell(value) -> str:
    """Three digits of a number; the median of several, with their range."""
    if isinstance(value, list):
        middle = cell(statistics.median(value))
        return f"{middle} ({cell(min(value))} to {cell(max(value))})" if len(value) > 1 else middle
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value).replace("_", " ")


if __name__ == "__main__":
    sys.exit(guard(main))
