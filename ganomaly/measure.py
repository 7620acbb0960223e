"""What training and scoring cost by count, what the machine could do, and what it does.

scripts/speed.py runs each function of the first part that takes a device in a process of its own.
Nothing of a run imports this.
"""

from __future__ import annotations

import copy
import inspect
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ganomaly import config as configuration
from ganomaly import replay
from ganomaly.batches import Batches
from ganomaly.config import ROOT, Config, resolve
from ganomaly.detector import Detector, load_detector
from ganomaly.device import use_threads
from ganomaly.files import write_torch
from ganomaly.images import read_images
from ganomaly.networks import build, initialise
from ganomaly.training import AMP, TICK, resolve_amp, train

# Paragraphs of train() before its loop, and those that not every step passes
ONCE = ("Set-up", "Networks", "Go on from a checkpoint", "On a GPU")
AT_CHECKPOINTS = ("Look at what is learnt so far", "Checkpoint")

# Measurements: they return what a JSON line can hold


def roof(device: torch.device, threads: int) -> dict:
    """Billions of multiply-adds a second of matrices' products; GB/s of a matrix by a vector."""
    use_threads(threads)
    found, side = {}, 8192 if device.type == "cuda" else 2048  # far longer than the wait for it
    for name, dtype in (("float32", None), ("amp", AMP[resolve_amp("auto", device)])):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[name] = side**3 / best_time(lambda a=a, b=b: a @ b, device) / 1e9
    a, b = torch.randn(4 * side, 4 * side, device=device), torch.randn(4 * side, device=device)
    return {**found, "GB": a.nbytes / best_time(lambda: a @ b, device) / 1e9}


def training(device: torch.device, values: dict, n: int, seconds: float, windows: int) -> dict:
    """Images a second of train() on n drawn images, its first steps left out, in each of some
    windows of time, three steps in all or more; on a GPU, the peak of its memory in MB."""
    config = resolve(values)
    use_threads(config.threads)
    # On a GPU a recording of the step, if there is one, is made behind its own warm-up
    warm_up = 2 + (device.type == "cuda") * (replay.WARM_UP + 1)
    watch = Stopwatch(device, seconds, warm_up, windows, least=-(-3 // windows))
    train_timed(config, drawn(config, n), device, watch)
    found = {"images_per_second": [config.batch_size * speed for speed in watch.speeds]}
    if device.type == "cuda":
        found["peak_GPU_MB"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def training_count(values: dict) -> float:
    """Billions of multiply-adds of a training step, per image, as torch counts them."""
    small, cpu = resolve(values).replace(batch_size=4, amp="fp32"), torch.device("cpu")
    with FlopCounterMode(display=False) as counter:
        train_timed(small, drawn(small, 4), cpu, Stopwatch(cpu, seconds=0, warm_up=0))
    return counter.get_total_flops() / 2e9 / small.batch_size


def profile(device: torch.device, name: str, threads: int) -> dict:
    """Milliseconds a training step by the paragraphs of train(), from a run of a recipe that is too
    short for a CUDA graph."""
    from ganomaly import pipeline  # scikit-learn, for which no other measurement waits

    recipe = load_recipe(name)
    config = recipe.replace(
        dataset="folder", category="drawn", steps=2 * TICK, checkpoint_every=TICK, amp="auto",
        threads=threads,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        draw_category(Path(scratch) / "drawn", 260, 60)
        with Paragraphs(train, device) as inside:
            setting = pipeline.Setting(Path(scratch), device)
            pipeline.run_one(config, Path(scratch) / "local", setting)
        paths = list((Path(scratch) / "drawn").rglob("*.png"))
        begun = time.perf_counter()
        pixels = read_images(paths, config.image_size, config.channels)
        decoded = time.perf_counter()
    detector = untrained(config, device)
    before = time.perf_counter()
    detector.scores(pixels)
    scored = time.perf_counter() - before
    phases = {title: 1000 * spent / config.steps for title, spent in inside.seconds.items()}
    for title in AT_CHECKPOINTS:  # which come at the recipe's own interval
        phases[title] *= config.checkpoint_every / recipe.checkpoint_every
    return {
        **{title: ms for title, ms in phases.items() if title not in ONCE},
        "decoding, an image": 1000 * (decoded - begun) / len(paths),
        "scoring, an image": 1000 * scored / len(paths),
    }


def scoring(device: torch.device, name: str, seconds: float, windows: int) -> dict:
    """Milliseconds from one uint8 image to all of its scores, median and 99th percentile of each
    window of time, and what that costs by count."""
    detector = untrained(load_recipe(name), device)
    use_threads(detector.config.threads)
    image, found = drawn(detector.config, 1), {"median": [], "p99": []}
    counted = copy.copy(detector)
    counted.fast = detector.networks  # the counter does not know packed layers
    with FlopCounterMode(display=False) as counter:
        counted.scores(image)
    for _ in range(windows):
        times, end = [], time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end or len(times) < 10:
            detector.scores(image)  # they come back to the host: nothing to wait for
            times.append(time.perf_counter() - begun)
        found["median"].append(1000 * float(np.median(times)))
        found["p99"].append(1000 * float(np.quantile(times, 0.99)))
    weights = [p for network in detector.networks.values() for p in network.parameters()]
    return {
        **found,
        "G_multiply_adds": counter.get_total_flops() / 2e9,
        "weights_GB": sum(p.nbytes for p in weights) / 1e9,
    }


def decode_and_score(device: torch.device, folder: str, n: int, side: int) -> dict:
    """Draw n photographs in folder/images and a folder/model.pt; seconds to decode and score."""
    images, model = Path(folder) / "images", Path(folder) / "model.pt"
    images.mkdir()
    for i in range(n):
        blotches(i, side).save(images / f"{i:05}.jpg", quality=90)
    write_torch(model, untrained(load_recipe("calibrated"), torch.device("cpu")).state())
    detector = load_detector(model, device)
    use_threads(detector.config.threads)
    config = detector.config
    begun = time.perf_counter()
    pixels = read_images(sorted(images.iterdir()), config.image_size, config.channels)
    decoded = time.perf_counter()
    detector.scores(pixels)
    return {"decode": decoded - begun, "score": time.perf_counter() - decoded}


def first_step(device: torch.device) -> dict:
    """When train.py, with nothing given, asks for its first batch."""
    found: dict = {}

    def asked(_):
        found["at"] = time.time()
        raise KeyboardInterrupt

    Batches.next = asked
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv[1:] = ["--experiments-dir", scratch, "--device", str(device)]
        try:
            runpy.run_path(str(ROOT / "scripts/train.py"), run_name="__main__")
        except SystemExit:
            pass
    return found


# How


class Enough(Exception):
    """Ends a training that is only timed."""


class Stopwatch:
    """The `run` that train() takes: writes nothing, tells steps a second, and stops it in time.

    The first `warm_up` steps are not counted: kernels are chosen and memory is claimed in them.
    A window lasts `seconds`, and `least` steps.
    """

    def __init__(self, device: torch.device, seconds: float, warm_up: int, windows=1, least=1):
        self.device, self.seconds, self.warm_up = device, seconds, warm_up
        self.windows, self.least = windows, least
        self.steps, self.since = 0, time.perf_counter()
        self.speeds: list[float] = []  # of each window
        self.progress = self  # train() calls run.progress.update() after each step

    def load(self) -> None: ...

    def log(self, record: dict) -> None: ...

    def update(self) -> None:
        if self.warm_up:
            self.warm_up -= 1
            wait_for(self.device)
            self.since = time.perf_counter()
            return
        self.steps += 1
        if self.steps % TICK == 0:  # a GPU has only been told of them
            wait_for(self.device)
        if self.steps >= self.least and time.perf_counter() - self.since >= self.seconds:
            wait_for(self.device)
            now = time.perf_counter()
            self.speeds.append(self.steps / (now - self.since))
            self.steps, self.since = 0, now
            if len(self.speeds) == self.windows:
                raise Enough


def train_timed(config: Config, images: Tensor, device: torch.device, watch: Stopwatch) -> None:
    endless = config.replace(steps=10**9, checkpoint_every=10**9)
    try:
        train(endless, images, device, watch)
    except Enough:
        pass


class Paragraphs:
    """Times one call of a long linear function by the comments that head its paragraphs.

    `with Paragraphs(train, device) as p`: p.seconds maps a comment, up to its first punctuation
    mark, to the seconds in its lines, those of functions inside of it too, and in all that they
    call. On a GPU each line is waited for.
    """

    def __init__(self, function: Callable, device: torch.device):
        inside = (part for part in function.__code__.co_consts if isinstance(part, CodeType))
        self.codes, self.device = {function.__code__, *inside}, device
        self.seconds: dict[str, float] = {}
        self.title, self.since = None, 0.0
        lines, first = inspect.getsourcelines(function)
        self.titles, title, before = {}, "Set-up", ""
        for number, line in enumerate(map(str.strip, lines), first):
            if line.startswith("# ") and not before.startswith("#"):
                title = line[2:].replace(";", ",").replace(":", ",").split(",")[0]
            self.titles[number], before = title, line

    def __enter__(self) -> Paragraphs:
        sys.settrace(lambda frame, *_: self.line if frame.f_code in self.codes else None)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(None)

    def line(self, frame, *_):
        wait_for(self.device)
        if self.title is not None:
            spent = time.perf_counter() - self.since
            self.seconds[self.title] = self.seconds.get(self.title, 0.0) + spent
        self.title, self.since = self.titles[frame.f_lineno], time.perf_counter()
        return self.line


def best_time(function: Callable, device: torch.device) -> float:
    times = []
    for _ in range(10):
        wait_for(device)
        begun = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# On what


def load_recipe(name: str) -> Config:
    return configuration.load(ROOT / "experiments" / name / "config.json")


def drawn(config: Config, n: int) -> Tensor:
    """Noise: uint8 (n, C, S, S)."""
    shape = (n, config.channels, config.image_size, config.image_size)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def blotches(seed: int, side: int) -> Image.Image:
    """A drawn photograph: smooth blotches of colour."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(40, 200, (9, 9, 3), dtype=np.uint8)).resize((side, side))


def draw_category(folder: Path, n_train: int, n_test: int, side: int = 256) -> None:
    """Blotches in MVTec AD's layout; the defective ones have a bar."""
    for place, n in (("train/good", n_train), ("test/good", n_test), ("test/bar", n_test)):
        (folder / place).mkdir(parents=True)
        for i in range(n):
            image = blotches(i, side)
            if place == "test/bar":
                image.paste((255, 255, 255), (side // 8, side // 3, side - side // 8, side // 2))
            image.save(folder / place / f"{i:03}.png")


def untrained(config: Config, device: torch.device) -> Detector:
    """A detector of random weights: as fast as any other."""
    networks = build(config)
    for network in networks.values():
        initialise(network, torch.Generator().manual_seed(0))
    scale = None if config.normalise == "none" else 1.0
    detector = Detector(networks, config, device, scale)
    detector.calibrate(drawn(config, 20))
    return detector
