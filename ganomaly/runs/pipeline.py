"""One run from end to end: load, train, calibrate, score, evaluate, write."""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ganomaly import data
from ganomaly.config import Config
from ganomaly.data import Category
from ganomaly.detector import Detector, load_detector
from ganomaly.device import use_threads
from ganomaly.errors import UserError, describe, flag, lost_device, out_of_memory, reason_of
from ganomaly.files import Busy, locked, write_output, write_torch
from ganomaly.images import read_images
from ganomaly.runs import evaluation, experiment, pictures, report, results
from ganomaly.runs.experiment import ANEW, Run
from ganomaly.runs.provenance import changed_code, now, provenance
from ganomaly.training import Trained, resolve_amp, train

PAUSE = 2  # seconds, while other processes are at all that is left
TRAINED, AGAIN, BEFORE = "trained", "evaluated again", "done before"  # what run_one did


@dataclass(frozen=True)
class Setting:
    """What a command says that is no part of a config."""

    data_root: Path | None
    device: torch.device
    force: bool = False  # train anew, over what is there
    download: bool = False  # fetch mnist or cifar10 where it is missing
    recipe: str | None = None  # whose committed table stands beside the results


def run_of(config: Config, folder: Path, setting: Setting, forced: Collection[Path] = ()) -> Run:
    """The run of a config in an experiment's folder; UserError where that has another recipe."""
    config = with_precision(config, setting.device)
    run = Run(folder, data.category_name(config, setting.data_root), config)
    experiment.check_recipe(folder, config, forced or [run.folder] * setting.force)
    return run


def plan(config: Config, folder: Path, setting: Setting, forced: Collection[Path] = ()) -> str:
    """What run_one would do; UserError where it would be refused before it looks at the images."""
    run = run_of(config, folder, setting, forced)
    action = run.plan(setting.force)
    if run.finished and not setting.force:
        before = experiment.read_metrics(run.path("metrics.json"))
        if not unchanged(before, run.config, setting):
            action = f"{run.folder}: evaluate again, its test images changed"
    elif run.config.in_folders:
        data.category_folder(run.config, setting.data_root)
    else:
        data.check_class(run.config)
    return action


def plan_all(jobs: dict[str, tuple[Config, Path]], setting: Setting) -> int:
    """Print what run_all() would do; returns 1 where some of it would be refused, else 0."""
    refused, forced = 0, forced_by(jobs, setting)
    for name, (config, folder) in jobs.items():
        try:
            print(" ", plan(config, folder, setting, forced))
        except UserError as error:
            refused = 1
            print(f"  {name}: refused, {error}")
    return refused


def forced_by(jobs: dict[str, tuple[Config, Path]], setting: Setting) -> set[Path]:
    """The folders of the runs that --force trains anew."""
    if not setting.force:
        return set()
    return {
        Run(folder, data.category_name(config, setting.data_root), config).folder
        for config, folder in jobs.values()
    }


def run_one(
    config: Config,
    folder: Path,
    setting: Setting,
    *,
    forced: Collection[Path] = (),
    progress: tqdm | None = None,
    since: str = "9999",
) -> tuple[dict, str]:
    """Train and evaluate one config into the experiment's folder.

    Returns its metrics and what was done: a finished run of the same images and code is left as it
    is unless setting.force, an unfinished one goes on from its checkpoint. One that was begun after
    `since`, an ISO date, is taken to be of the images and code that are there now. forced: the
    folders of all runs that the command trains anew. The experiment's tables are the caller's to
    write. Busy, a UserError, where another process is at work on the same run.
    """
    run = run_of(config, folder, setting, forced)
    with locked(run.folder):
        return run_locked(run, setting, forced or {run.folder}, progress, since)


def run_locked(
    run: Run, setting: Setting, forced: Collection[Path], progress: tqdm | None, since: str
) -> tuple[dict, str]:
    config, folder = run.config, run.experiment
    if not setting.force:
        run.check()
        if run.finished:
            before = experiment.read_metrics(run.path("metrics.json"))
            if progress is not None:
                run.progress = progress
                run.skip(config.steps)
            recent = before["provenance"].get("date", "") > since
            if recent or unchanged(before, config, setting):
                return before, BEFORE
            return evaluate_again(run, setting), AGAIN
    use_threads(config.threads)
    hashes = data.image_hashes(config, setting.data_root)
    origin = {**provenance(setting.device, config), **hashes}
    category = data.load(config, setting.data_root, setting.download)
    experiment.write_recipe(folder, config, forced if setting.force else ())
    run.begin(anew=setting.force)
    run.preview_images = category.calibration[:8]
    if len(category.test_labels):
        run.look = partial(evaluation.look, config, category, setting.device)
    own = tqdm(
        total=config.steps, desc=run.name, unit="step", disable=None if progress is None else True
    )
    run.progress = own if progress is None else progress
    try:
        trained = train_in_memory(config, category.train, setting.device, run)
        own.close()
        detector = Detector(trained.networks, config, setting.device, trained.scale)
        detector.calibrate(category.calibration)
        # Before all that is only a figure or a picture: whatever fails there, the model is kept
        write_torch(run.path("model.pt"), detector.state())
        write_samples(run, detector, category)
        training = {
            "train_seconds": round(trained.seconds, 2),
            "images_per_second": round(trained.images_per_second, 1),
            "provenance": origin,
        }
        metrics = evaluation.assess(run, detector, category, training)
    except KeyboardInterrupt:
        goes_on = f"from step {run.step}" if run.step else "from the start"
        raise KeyboardInterrupt(f"the same command, without --force, goes on {goes_on}") from None
    finally:
        own.close()
        run.close()
    return metrics, TRAINED


def evaluate_again(run: Run, setting: Setting) -> dict:
    """Score the images of a finished run with its model.pt; rewrites scores.csv and metrics.json.

    UserError where its training images are others now.
    """
    before = experiment.read_metrics(run.path("metrics.json"))
    detector = load_detector(run.path("model.pt"), setting.device)
    config = detector.config
    use_threads(config.threads)
    hashes = data.image_hashes(config, setting.data_root)
    check_train_images(before, hashes, config, setting.data_root)
    category = data.load(config, setting.data_root, setting.download)
    if detector.missing_scores:  # that are newer than the model
        detector.calibrate(category.calibration)
        write_torch(run.path("model.pt"), detector.state())
    training = {key: before[key] for key in results.TIMES}
    training["provenance"] = {**before["provenance"], **hashes}
    metrics = evaluation.assess(run, detector, category, training)
    if metrics["provenance"] != before["provenance"]:  # its looks were at other images
        run.path("curve.csv").unlink(missing_ok=True)
    return metrics


def train_in_memory(config: Config, images: Tensor, device: torch.device, run: Run) -> Trained:
    """train(); where memory does not suffice, a UserError that says what takes half."""
    try:
        return train(config, images, device, run)
    except Exception as error:
        if not out_of_memory(error):
            raise
        half = config.batch_size // 2
        hint = f"--batch-size {half} takes about half" if half else "lower --image-size or --width"
        raise UserError(
            f"out of memory with images of {config.image_size} pixels, width {config.width}, "
            f"batches of {config.batch_size}{reason_of(error)}: {hint}; {ANEW}"
        ) from None


def run_all(
    jobs: dict[str, tuple[Config, Path]], setting: Setting, line_of: Callable[[dict], str]
) -> tuple[dict[str, dict], dict[str, str]]:
    """run_one() for every job: a name, its config, its experiment's folder.

    Returns the metrics of those that are done and the reasons of those that failed. Runs that
    another process is at are tried last, so that any number of these processes share the work, the
    longest first. line_of makes the line that is printed of a run's metrics. Tables are written
    when all is done, and before as long as that takes little time.
    """
    finished, failed, outcomes = {}, {}, []
    others, done, tables, since = 0, 0, Tables(setting.recipe), now()
    forced = forced_by(jobs, setting)
    waiting = deque(sorted(jobs, key=lambda name: -jobs[name][0].steps))
    total = sum(config.steps for config, _ in jobs.values())
    with tqdm(total=total, unit="step", disable=None) as bar:
        while waiting:
            name = waiting.popleft()
            config, folder = jobs[name]
            bar.set_description(f"{len(jobs) - len(waiting)}/{len(jobs)} {name}")
            try:
                metrics, outcome = run_one(
                    config, folder, setting, forced=forced, progress=bar, since=since
                )
                tables.write(folder, at_once=False)
                line = line_of(metrics)
                bar.write(f"{name}: {line}" + (f" ({outcome})" if outcome != TRAINED else ""))
                finished[name] = metrics
                outcomes.append(outcome)
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
    for folder in {jobs[name][1] for name in finished}:
        tables.write(folder, at_once=True)
    if outcomes and set(outcomes) == {BEFORE} and not failed:
        print(f"all {len(outcomes)} runs were done before; {flag('--force')} trains them anew")
    for name, reason in failed.items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    return finished, failed


class Tables:
    """Writes experiments' tables, which takes longer with each run, in a tenth of the time."""

    def __init__(self, recipe: str | None):
        self.recipe, self.begun, self.seconds = recipe, time.perf_counter(), 0.0

    def write(self, folder: Path, at_once: bool) -> None:
        begun = time.perf_counter()
        if at_once or self.seconds <= 0.1 * (begun - self.begun):
            experiment.write_results(folder, self.recipe)
            self.seconds += time.perf_counter() - begun


def unchanged(before: dict, config: Config, setting: Setting) -> bool:
    """Whether the test images are those of a finished run's metrics.

    UserError where its training images or its code are others, or where the images are gone.
    """
    name, origin = f"{before['category']} seed {config.seed}", before["provenance"]
    if changed := changed_code(origin.get("code")):
        raise UserError(f"{name}: trained by other code ({changed} changed since); {ANEW}")
    hashes = data.image_hashes(config, setting.data_root)
    check_train_images(before, hashes, config, setting.data_root)
    return origin.get("test_images") == hashes.get("test_images")


def check_train_images(before: dict, hashes: dict, config: Config, data_root: Path | None) -> None:
    """UserError where a finished run was trained on other images than those of the hashes."""
    then = before["provenance"].get("train_images")
    if then and then != hashes["train_images"]:
        raise UserError(
            f"{before['category']} seed {config.seed}: trained on other images than those in "
            f"{data.category_folder(config, data_root)} now; {ANEW}"
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
    if not (folder / "results.md").is_file() and list(folder.glob("*/seed*/metrics.json")):
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
        if config.in_folders:
            hashes = data.image_hashes(config, data_root)
            check_train_images(row, hashes, config, data_root)
            if row["provenance"].get("test_images") != hashes["test_images"]:
                raise UserError("its test images changed since; make evaluate scores them again")
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
