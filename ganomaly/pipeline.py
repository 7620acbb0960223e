"""One run from end to end: load, train, calibrate, score, evaluate, write."""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ganomaly import (  # evaluation loads BLAS, whose threads use_threads limits
    data,
    evaluation,
    experiment,
    pictures,
    report,
)
from ganomaly.config import Config
from ganomaly.data import Category
from ganomaly.detector import Detector, load_detector
from ganomaly.device import use_threads
from ganomaly.errors import UserError, describe, lost_device, out_of_memory
from ganomaly.experiment import Run
from ganomaly.files import Busy, locked, write_output, write_torch
from ganomaly.images import read_images
from ganomaly.provenance import now, provenance
from ganomaly.training import Trained, resolve_amp, train

PAUSE = 2  # seconds, while other processes are at all that is left


def run_of(config: Config, folder: Path, data_root: Path | None, device: torch.device) -> Run:
    """The run of a config in an experiment's folder; UserError where that has another recipe."""
    config = with_precision(config, device)
    run = Run(folder, data.category_name(config, data_root), config)
    experiment.check_recipe(folder, config)
    return run


def plan(
    config: Config, folder: Path, data_root: Path | None, device: torch.device, force: bool
) -> str:
    """What run_one would do; UserError where it would be refused before it looks at the images."""
    run = run_of(config, folder, data_root, device)
    config, told = run.config, run.plan(force)
    if run.finished and not force:
        check_train_files(experiment.read_metrics(run.path("metrics.json")), config, data_root)
    elif config.dataset in ("mvtec", "folder"):
        data.category_folder(config, data_root)
    else:
        data.check_class(config)
    return told


def plan_all(
    jobs: dict[str, tuple[Config, Path]],
    data_root: Path | None,
    device: torch.device,
    force: bool = False,
) -> int:
    """Print what run_all() would do; returns 1 where some of it would be refused, else 0."""
    refused = 0
    for name, (config, folder) in jobs.items():
        try:
            print(" ", plan(config, folder, data_root, device, force))
        except UserError as error:
            refused = 1
            print(f"  {name}: refused, {error}")
    return refused


def run_one(
    config: Config,
    folder: Path,
    data_root: Path | None,
    device: torch.device,
    *,
    force: bool = False,
    download: bool = False,
    progress: tqdm | None = None,
    since: str = "9999",
) -> tuple[dict, bool]:
    """Train and evaluate one config into the experiment's folder.

    Returns its metrics and whether there was anything to do: a finished run is left as it is
    unless `force`, an unfinished one goes on from its checkpoint. One that was begun after `since`,
    an ISO date, is taken to be of the images that are there now. The experiment's tables are the
    caller's to write. Busy, a UserError, where another process is at work on the same run.
    """
    run = run_of(config, folder, data_root, device)
    with locked(run.folder):
        return run_locked(run, data_root, device, force, download, progress, since)


def run_locked(
    run: Run, data_root: Path | None, device: torch.device, force: bool, download: bool,
    progress: tqdm | None, since: str,
) -> tuple[dict, bool]:  # fmt: skip
    config, folder = run.config, run.experiment
    if not force:
        run.check()
        if run.finished:
            before = experiment.read_metrics(run.path("metrics.json"))
            if before["provenance"].get("date", "") <= since:
                check_train_files(before, config, data_root)
            if progress is not None:
                run.progress = progress
                run.skip(config.steps)
            return before, False
    use_threads(config.threads)
    origin = provenance(device, config) | {"train_files": data.train_files(config, data_root)}
    category = data.load(config, data_root, download)
    experiment.write_recipe(folder, config)
    run.begin(anew=force)
    run.preview_images = category.calibration[:8]
    if len(category.test_labels):
        run.look = partial(evaluation.look, config, category, device)
    own = tqdm(
        total=config.steps, desc=run.name, unit="step", disable=None if progress is None else True
    )
    run.progress = own if progress is None else progress
    try:
        trained = train_or_tell(config, category.train, device, run)
        own.close()
        detector = Detector(trained.networks, config, device, trained.scale)
        detector.calibrate(category.calibration)
        write_samples(run, detector, category)
        training = {
            "train_seconds": round(trained.seconds, 2),
            "images_per_second": round(trained.images_per_second, 1),
            "provenance": origin,
        }
        after = evaluation.assess(run, detector, category, training)
        # Last: with it the run is finished, and the metrics beside it are its own.
        write_torch(run.path("model.pt"), detector.state())
    except KeyboardInterrupt:
        goes_on = f"from step {run.step}" if run.step else "from the start"
        raise KeyboardInterrupt(f"the same command, without --force, goes on {goes_on}") from None
    finally:
        own.close()
        run.close()
    return after, True


def train_or_tell(config: Config, images: Tensor, device: torch.device, run: Run) -> Trained:
    """train(); where memory does not suffice, a UserError with what would take half."""
    try:
        return train(config, images, device, run)
    except Exception as error:
        if not out_of_memory(error):
            raise
        told, half = " ".join(str(error).split())[:200], config.batch_size // 2
        mend = f"--batch-size {half} takes about half" if half else "lower --image-size or --width"
        raise UserError(
            f"out of memory with images of {config.image_size} pixels, width {config.width}, "
            f"batches of {config.batch_size} ({told}): {mend}, which is another config, for "
            "--force or another --experiment"
        ) from None


def run_all(
    jobs: dict[str, tuple[Config, Path]],
    data_root: Path | None,
    device: torch.device,
    tell: Callable[[dict], str],
    *,
    force: bool = False,
    download: bool = False,
) -> dict[str, str]:
    """run_one() for every job, named, with its experiment's folder; returns what failed, and why.

    What another process is at is seen again when the rest is done, so that any number of these
    processes share the work, the longest first. `tell` makes the line that is printed of a run's
    metrics. Tables are written when all is done, and before as long as that takes little time.
    """
    failed, others, done, tables, since = {}, 0, 0, Tables(), now()
    waiting = deque(sorted(jobs, key=lambda name: -jobs[name][0].steps))
    total = sum(config.steps for config, _ in jobs.values())
    with tqdm(total=total, unit="step", disable=None) as bar:
        while waiting:
            name = waiting.popleft()
            config, folder = jobs[name]
            bar.set_description(f"{len(jobs) - len(waiting)}/{len(jobs)} {name}")
            try:
                metrics, trained = run_one(
                    config, folder, data_root, device,
                    force=force, download=download, progress=bar, since=since,
                )  # fmt: skip
                tables.write(folder, at_once=False)
                bar.write(f"{name}: {tell(metrics)}" + ("" if trained else " (done before)"))
            except Busy:
                waiting.append(name)
                others += 1
                if others >= len(waiting):
                    bar.set_description(f"waiting for other processes' runs, {len(waiting)}")
                    time.sleep(PAUSE)
                    others = 0
                continue
            except Exception as error:
                if lost_device(error):  # a launcher starts another process
                    raise
                failed[name] = describe(error)
                if failed[name] is None:  # a bug of ours: show it whole
                    traceback.print_exc()
                    failed[name] = f"{type(error).__name__}: {error}"
            others = 0
            done += config.steps  # also of a run that stopped half way
            bar.n = bar.last_print_n = done
            bar.refresh()
    for folder in {folder for _, folder in jobs.values() if folder.is_dir()}:
        tables.write(folder, at_once=True)
    for name, reason in failed.items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    return failed


class Tables:
    """Writes experiments' tables, which takes longer with each run, in a tenth of the time."""

    def __init__(self):
        self.begun, self.seconds = time.perf_counter(), 0.0

    def write(self, folder: Path, at_once: bool) -> None:
        begun = time.perf_counter()
        if at_once or self.seconds <= 0.1 * (begun - self.begun):
            experiment.write_results(folder)
            self.seconds += time.perf_counter() - begun


def check_train_files(row: dict, config: Config, data_root: Path | None) -> None:
    """UserError where a finished run was trained on other images than those that are there now."""
    before, now = row["provenance"].get("train_files"), data.train_files(config, data_root)
    if before and now and before != now:
        raise UserError(
            f"{row['category']} seed {config.seed}: trained on other images than those in "
            f"{data.category_folder(config, data_root)} now; --force trains it anew, "
            "--experiment NAME keeps both"
        )


def with_precision(config: Config, device: torch.device) -> Config:
    """The config with the precision that `auto` stands for on this device."""
    return config.replace(amp=resolve_amp(config.amp, device))


def write_samples(run: Run, detector: Detector, category: Category) -> None:
    pixels = category.calibration[:8]
    if len(category.test_labels):
        pixels = category.test[evaluation.samples_of(category.test_labels)]
    o = detector.outputs(pixels)
    run.write_samples(o.x, o.x_hat)


def write_report(folder: Path, output: Path, data_root: Path | None, device: torch.device) -> None:
    """The page of an experiment, with pictures where its models and images are at hand."""
    if not (folder / "results.md").is_file():
        experiment.write_results(folder)
    explain = partial(explained_images, data_root=data_root, device=device)
    page = report.page(folder, explain)
    with locked(folder, wait=True):
        write_output(output, page)


def explained_images(
    run: Path, row: dict, paths: list[str], *, data_root: Path | None, device: torch.device
) -> list[bytes] | str:
    """PNG pictures of a finished run's test images, or the reason why there are none."""
    if not (run / "model.pt").is_file():
        return (
            "The images on which the runs err: git keeps no weights; make report shows them where "
            "the runs were made."
        )
    try:
        detector = load_detector(run / "model.pt", device)
        config = detector.config
        use_threads(config.threads)
        if config.dataset in ("mvtec", "folder"):
            check_train_files(row, config, data_root)
            if any(Path(path).is_absolute() or ".." in Path(path).parts for path in paths):
                raise UserError("its scores.csv names files outside of the category's folder")
            files = [data.category_folder(config, data_root) / path for path in paths]
            pixels = read_images(files, config.image_size, config.channels)
            shown = read_images(files, pictures.SIDE, config.channels)
        else:
            category = data.load(config, data_root)
            shown = pixels = category.test[[category.test_paths.index(path) for path in paths]]
    except UserError as error:
        return f"The images on which {row['category']} errs: {error}."
    parts = zip(shown, detector.reconstructions(pixels), detector.heat_maps(pixels))
    return [pictures.png(pictures.explained(*part)) for part in parts]
