"""One run from end to end, or many: load, train, calibrate, score, evaluate, write."""

import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ganomaly import data
from ganomaly.config import Config, load_config
from ganomaly.detector import Detector, load_detector
from ganomaly.device import use_threads
from ganomaly.errors import UserError, describe, out_of_memory
from ganomaly.files import Busy, locked, write_torch
from ganomaly.networks import build
from ganomaly.runs import evaluation, experiment
from ganomaly.runs.provenance import changed_code, provenance
from ganomaly.runs.results import TIMES, recipe_of
from ganomaly.runs.run import ANEW, Recorder, Run, read_metrics, refuse_other
from ganomaly.training import resolve_amp, train

TRAINED, REEVALUATED, DONE_BEFORE = "trained", "evaluated again", "done before"  # what run_one did
Jobs = dict[str, tuple[Config, Path]]  # a name -> a run's config and its experiment's folder


class Setting(NamedTuple):
    """What a command says that is no part of a config."""

    data_root: Path | None
    device: torch.device
    force: bool = False  # train anew, over what is there
    download: bool = False  # fetch mnist or cifar10 where it is missing
    recipe: str | None = None  # its name; a committed table of this name stands beside the results


def run_of(config: Config, folder: Path, setting: Setting) -> Run:
    """The run of a config in an experiment's folder, its precision resolved for the device.

    UserError if there is no such category, so that a typo makes no folder. UserError if the
    experiment has another recipe, unless the run is trained anew.
    """
    config = config.replace(amp=resolve_amp(config.amp, setting.device))
    recipe = folder / "config.json"
    if recipe.is_file() and not setting.force:
        refuse_other(recipe_of(config), recipe_of(load_config(recipe)), recipe)
    data.category_folder(config, setting.data_root)
    return Run(folder, data.category_name(config, setting.data_root), config)


def outcome_of(run: Run, setting: Setting) -> str:
    """What is to be done with a run: TRAINED, REEVALUATED or DONE_BEFORE.

    UserError where it is of another config, of other code or of other training images, or where
    its images are gone. REEVALUATED: a finished run whose test images are others now.
    """
    if setting.force:
        return TRAINED
    path = run.folder / "config.json"
    if path.is_file() or any(run.folder.glob("*.pt")):
        refuse_other(run.config, load_config(path), run.folder)
    if not run.finished:
        return TRAINED
    before = read_metrics(run.folder)
    if changed := changed_code(before["provenance"].get("code")):
        raise UserError(f"{run.name}: trained by other code ({changed} changed since); {ANEW}")
    hashes = checked_hashes(run, setting, before)
    same = before["provenance"].get("test_images") == hashes.get("test_images")
    return DONE_BEFORE if same else REEVALUATED


def plan(run: Run, setting: Setting) -> str:
    """What run_one would do, in words; UserError if it would refuse. No pixels are read."""
    outcome, steps = outcome_of(run, setting), run.config.steps
    if outcome == DONE_BEFORE:
        action = "finished, left alone"
    elif outcome == REEVALUATED:
        action = "evaluate again, its test images changed"
    elif (run.folder / "last.pt").is_file() and not setting.force:
        action = f"go on from its checkpoint to step {steps}"
    else:
        action = f"train {steps} steps" + (" anew" if setting.force else "")
    return f"{run.folder}: {action}"


def plan_all(jobs: Jobs, setting: Setting) -> int:
    """Print what run_all() would do; returns 1 where some of it would be refused, else 0."""
    refused = 0
    for name, (config, folder) in jobs.items():
        try:
            print(" ", plan(run_of(config, folder, setting), setting))
        except UserError as error:
            refused = 1
            print(f"  {name}: refused, {error}")
    return refused


def run_one(config: Config, folder: Path, setting: Setting, bar: tqdm) -> tuple[dict, str]:
    """Train and evaluate one config into the experiment's folder; the bar counts its steps.

    Returns its metrics and what was done. A finished run of the same images and code is left as it
    is unless setting.force, an unfinished one goes on from its checkpoint. The experiment's tables
    are the caller's to write. Busy, a UserError, where another process is at work on the same run.
    """
    run = run_of(config, folder, setting)
    with locked(run.folder):
        outcome = outcome_of(run, setting)
        if outcome == TRAINED:
            return train_run(run, setting, bar), outcome
        bar.update(config.steps)  # of steps that were done before
        if outcome == REEVALUATED:
            return evaluate_again(run, setting), outcome
        return read_metrics(run.folder), outcome


def train_run(run: Run, setting: Setting, bar: tqdm) -> dict:
    """Train, calibrate and evaluate a run, whose lock is held; returns its metrics."""
    config, device = run.config, setting.device
    use_threads(config.threads)
    origin = {**provenance(device, config), **data.image_hashes(config, setting.data_root)}
    category = data.load(config, setting.data_root, setting.download)
    experiment.write_recipe(run.experiment, config, setting.force)
    run.begin(anew=setting.force)
    tqdm.write(f"{run.name}: {start_line(config, category, setting)}", sys.stderr)
    recorder = Recorder(run, partial(evaluation.look, config, category, device), bar)
    try:
        trained = train(config, category.train, device, recorder)
        of_images = {"kind": category.kind, "trained_on": data.fingerprints(category.train)}
        detector = Detector(trained.networks, config, device, trained.scale, **of_images)
        detector.calibrate(category.calibration)
        # model.pt comes first: if a figure or a picture fails, the model is kept
        write_torch(run.folder / "model.pt", detector.state())
        shown = category.calibration[:8]
        if len(category.test_labels):
            shown = category.test[evaluation.samples_of(category.test_labels)]
        run.write_samples(detector.outputs(shown))
        training = {
            "train_seconds": round(trained.seconds, 2),
            "images_per_second": round(config.steps * config.batch_size / trained.seconds, 1),
            "provenance": origin,
        }
        metrics = evaluation.assess(detector, category, training, run.folder)
        (run.folder / "last.pt").unlink(missing_ok=True)  # a kill before this costs only its space
        return metrics
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command, without --force, goes on") from None
    finally:
        recorder.close()


def start_line(config: Config, category: data.Category, setting: Setting) -> str:
    """What is trained, before the first step."""
    with torch.device("meta"):  # takes no memory
        weights = [p for network in build(config).values() for p in network.parameters()]
    size = "x".join(map(str, category.train.shape[1:]))
    recipe = f"recipe {setting.recipe}, " if setting.recipe else ""
    return (
        f"{recipe}{len(category.train)} images of {size}, "
        f"{sum(p.numel() for p in weights) / 1e6:.1f} million parameters, {config.steps} steps of "
        f"{config.batch_size} in {config.amp} on {setting.device}, --threads {config.threads}"
    )


def evaluate_again(run: Run, setting: Setting, score: str | None = None) -> dict:
    """Score the images of a finished run with its model.pt; rewrites scores.csv and metrics.json.

    With another score than the run's, nothing is written. UserError where its training images are
    others now.
    """
    before = read_metrics(run.folder)
    detector = load_detector(run.folder / "model.pt", setting.device)
    config = detector.config
    refuse_other(run.config, config, run.folder / "model.pt")
    use_threads(config.threads)
    hashes = checked_hashes(run, setting, before)
    category = data.load(config, setting.data_root, setting.download)
    folder = run.folder if score in (None, config.score) else None
    # Scores that are newer than the model, or of another formula now, are calibrated again
    if changed_code(before["provenance"].get("code")):
        detector.calibrate(category.calibration)
        if folder:
            write_torch(folder / "model.pt", detector.state())
    training = {key: before[key] for key in TIMES}
    training["provenance"] = {**before["provenance"], **hashes}
    detector.set_quantile(score=score)
    metrics = evaluation.assess(detector, category, training, folder)
    if folder and metrics["provenance"] != before["provenance"]:  # of the old test images
        (folder / "curve.csv").unlink(missing_ok=True)
    return metrics


def checked_hashes(run: Run, setting: Setting, before: dict) -> dict[str, str]:
    """Hashes of the images that are there now; UserError if the run was trained on others."""
    hashes = data.image_hashes(run.config, setting.data_root)
    if before["provenance"].get("train_images") != hashes.get("train_images"):
        folder = data.category_folder(run.config, setting.data_root)
        raise UserError(f"{run.name}: trained on other images than those in {folder} now; {ANEW}")
    return hashes


def run_all(jobs: Jobs, setting: Setting) -> tuple[dict[str, dict], dict[str, str]]:
    """run_one() for every job, with a line about each.

    Returns the metrics of those that are done and the reasons of those that failed. Runs locked by
    another process are tried last, so that any number of these processes share the work, the
    longest first.
    """
    finished, failed = {}, {}
    waiting = sorted(jobs, key=lambda name: -jobs[name][0].steps)
    total = sum(config.steps for config, _ in jobs.values())
    with tqdm(total=total, unit="step", disable=None) as bar:
        while waiting:
            busy = []
            for name in waiting:
                config, folder = jobs[name]
                bar.set_description(f"{len(finished) + len(failed) + 1}/{len(jobs)} {name}")
                try:
                    metrics, outcome = run_one(config, folder, setting, bar)
                    if outcome != DONE_BEFORE:  # else n finished runs would make the tables n times
                        experiment.write_results(folder, setting.recipe)
                    line = "nothing to evaluate"
                    if metrics["auroc"] is not None:
                        line = "AUROC {auroc:.4f}, F1 {f1:.4f}, PCA-40 {auroc_pca:.4f}"
                    bar.write(f"{name}: {line.format_map(metrics)} ({outcome})")
                    finished[name] = metrics
                except Busy:
                    busy.append(name)
                except Exception as error:
                    if isinstance(error, torch.AcceleratorError) and not out_of_memory(error):
                        raise  # this process has lost its GPU; a launcher starts another one
                    failed[name] = describe(error) or traceback.format_exc()  # a bug of ours, whole
            if len(busy) == len(waiting):
                bar.set_description(f"waiting for other processes' runs, {len(waiting)}")
                time.sleep(2)
            waiting = busy
    for folder in {jobs[name][1] for name in finished}:
        experiment.write_results(folder, setting.recipe)
    for name, reason in failed.items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    return finished, failed
