"""The experiment folder: config, log, checkpoint, model, scores, metrics, results tables.

A run is experiments/<name>/<category>/seed<seed>/. Every file but the log and TensorBoard's is
whole or not there. A run is finished when metrics.json and model.pt are both there; model.pt is
written last.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ganomaly import config as configuration
from ganomaly import curves
from ganomaly.batches import to_input
from ganomaly.config import Config
from ganomaly.errors import UserError
from ganomaly.files import locked, naming, read_torch, write_atomic, write_torch
from ganomaly.pictures import panel, png
from ganomaly.results import (
    ALWAYS,
    COUNTS,
    FIGURES,
    METRICS,
    csv_text,
    results_csv,
    results_md,
)

# A run's files; of a killed process, then in the order in which a run is taken back: what is left
# half removed is neither finished nor goes on under another config.
OURS = (
    ".*.tmp", "model.pt", "metrics.json", "last.pt", "last.damaged.pt", "scores.csv",
    "curve.csv", "samples.png", "log.jsonl", "events.out.tfevents.*", "config.json",
)  # fmt: skip
# Files of an experiment, beside its runs
SHARED = ("config.json", "results.csv", "results.md", "curves.svg", "report.html")
SCRATCH = "local"  # the experiment of make train: runs of any config, ignored by git
SEED = 42  # of a recipe's config.json


class Run:
    """One run's folder; the log and checkpoint that train() takes."""

    def __init__(self, experiment: Path, category: str, config: Config):
        self.config, self.name = config, f"{category} seed {config.seed}"
        self.experiment = experiment
        self.folder = experiment / category / f"seed{config.seed}"
        self.progress: tqdm = tqdm(disable=True)  # the caller's bar, where there is one
        self.preview_images: Tensor | None = None  # uint8, for TensorBoard's reconstructions
        # networks, scale -> {score: AUROC}, where there is a test set
        self.look: Callable | None = None
        self.board = None
        self.step = 0  # of the last checkpoint

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def finished(self) -> bool:
        return self.path("metrics.json").is_file() and self.path("model.pt").is_file()

    def plan(self, force: bool) -> str:
        """What a command would do with the run; UserError where it would be refused."""
        if force:
            return f"{self.folder}: train {self.config.steps} steps anew"
        self.check()
        if self.finished:
            return f"{self.folder}: finished, left alone"
        if self.path("last.pt").is_file():
            return f"{self.folder}: go on from its checkpoint to step {self.config.steps}"
        return f"{self.folder}: train {self.config.steps} steps"

    def check(self) -> None:
        """UserError where the folder holds a run of another config, or of one that is gone."""
        if self.path("config.json").is_file():
            self.compare(configuration.load(self.path("config.json")))
        elif self.finished:  # a checkpoint has a copy
            raise UserError(f"{self.path('config.json')} is gone; --force trains this run anew")

    def compare(self, theirs: Config) -> None:
        if changed := configuration.differences(self.config, theirs):
            raise UserError(
                f"{self.folder} was made with another config: {', '.join(changed)}; "
                "--force trains it anew, --experiment NAME keeps both"
            )

    def begin(self, anew: bool) -> None:
        """Make the folder ready: nothing of an older run where `anew`."""
        for pattern in OURS if anew else OURS[:2]:  # a model without metrics is an older one
            for path in self.folder.glob(pattern):
                path.unlink()
        write_atomic(self.path("config.json"), self.config.to_json())

    # What train() calls

    def load(self) -> dict | None:
        """The last checkpoint, or None; log.jsonl and TensorBoard go on from its step."""
        path, state = self.path("last.pt"), None
        if path.is_file():
            try:
                state = read_torch(path)
                theirs = configuration.from_json(state["config"], path)
                if not {"seconds", "sums", "images"} <= state.keys() or state["step"] < 1:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
                state = None
                aside = path.with_name("last.damaged.pt")
                os.replace(path, aside)
                print(
                    f"warning: {path} is damaged; set aside as {aside.name}, training starts anew",
                    file=sys.stderr,
                )
        if state:
            self.compare(theirs)
        from torch.utils.tensorboard import SummaryWriter  # late: it takes a second to import

        self.step = step = state["step"] if state else 0
        if step:
            print(f"{self.name}: going on from step {step}", file=sys.stderr)
        write_atomic(self.path("log.jsonl"), "".join(kept_lines(self.path("log.jsonl"), step)))
        with naming(self.folder):
            self.board = SummaryWriter(self.folder, purge_step=step + 1)
            self.board.add_text("config", f"```\n{self.config.to_json()}```", step)
        return state

    def save(self, state: dict) -> None:
        write_torch(self.path("last.pt"), {**state, "config": self.config.to_json()})
        self.step = state["step"]

    def skip(self, steps: int) -> None:
        """Steps that are done already: they are no part of the speed."""
        if not self.progress.disable:
            self.progress.initial += steps
            self.progress.n += steps
            self.progress.refresh()

    def log(self, record: dict) -> None:
        step = record["step"]
        path = self.path("log.jsonl")
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        with naming(self.folder):
            for key in record.keys() - {"step"}:
                group = "speed" if key == "images_per_second" else "loss"
                self.board.add_scalar(f"{group}/{key}", record[key], step)
        # The two that tell most, and short enough for a terminal
        text = f"loss_d {record['discriminator']:.4f}, l1 {record['contextual']:.4f}"
        speed = f"{record['images_per_second']:.0f} images/s"
        self.progress.set_postfix_str(f"{text}, {speed}")
        if self.progress.disable:
            print(f"{self.name}: step {step}/{self.config.steps}, {text}, {speed}", file=sys.stderr)

    @torch.no_grad()
    def preview(self, step: int, networks: dict, scale: float | None) -> None:
        """TensorBoard's pictures and latents; a row of curve.csv, which nothing is chosen by."""
        if self.look is not None:
            aurocs = self.look(networks, scale)
            row = {"step": step, **{name: f"{value:.6g}" for name, value in aurocs.items()}}
            path = self.path("curve.csv")
            kept = [
                r for r in curves.rows_of(path) if r.keys() == row.keys() and int(r["step"]) < step
            ]
            rows = [list(r.values()) for r in (*kept, row)]
            write_atomic(path, csv_text(list(row), rows))
        generator = networks["generator"].eval()  # the running average, which never trains
        device = next(generator.parameters()).device
        x = to_input(self.preview_images, device, scale)
        z, x_hat, z_hat = generator(x)
        with naming(self.folder):
            self.board.add_image("reconstructions", panel(x, x_hat), step)
            self.board.add_histogram("latent/z", z, step)
            self.board.add_histogram("latent/z - z_hat", z - z_hat, step)
            self.board.flush()

    # Results

    def write_scores(self, category, scores: dict[str, Tensor]) -> None:
        """scores.csv: a row a test image, raw float32 scores."""
        columns = [[f"{value:.9g}" for value in values.tolist()] for values in scores.values()]
        rows = zip(category.test_paths, category.test_defects, category.test_labels, *columns)
        text = csv_text(["path", "defect", "label", *scores], [list(row) for row in rows])
        write_atomic(self.path("scores.csv"), text)

    def write_samples(self, x: Tensor, x_hat: Tensor) -> None:
        """samples.png: images, reconstructions, differences (white: a quarter of the range)."""
        pixels = (panel(x, x_hat) * 255).round().byte().permute(1, 2, 0).numpy()
        image, scale = Image.fromarray(pixels), max(1, 64 // x.shape[-1])
        larger = image.resize([side * scale for side in image.size], Image.Resampling.NEAREST)
        write_atomic(self.path("samples.png"), png(larger))

    def write_histograms(self, labels, scores: dict[str, Tensor], normal: dict[str, Tensor]):
        """Score histograms to TensorBoard: calibration, good and defective images."""
        for name, values in scores.items():
            groups = {"calibration": normal[name]}
            if len(labels):
                groups |= {"good": values[labels == 0], "defective": values[labels == 1]}
            with naming(self.folder):
                for group, part in groups.items():
                    self.board.add_histogram(f"{name}/{group}", part, self.config.steps)

    def close(self) -> None:
        if self.board is not None:
            with naming(self.folder):
                self.board.close()


def kept_lines(path: Path, step: int) -> list[str]:
    """The lines of a log up to a step; a half-written last one is dropped."""
    lines = path.read_text(errors="replace").splitlines(True) if path.is_file() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip("\n") + "\n")
        except (ValueError, KeyError, TypeError):
            pass
    return kept


# The recipe of an experiment


def check_recipe(experiment: Path, config: Config) -> None:
    """A named experiment holds runs of one recipe; UserError where this config is another."""
    path = experiment / "config.json"
    if experiment.name == SCRATCH or not path.is_file():
        return
    if changed := configuration.differences(recipe_of(config), recipe_of(configuration.load(path))):
        raise UserError(
            f"{path} is another recipe: {', '.join(changed)}; choose another --experiment, "
            "or remove that file if it was a mistake"
        )


def write_recipe(experiment: Path, config: Config) -> None:
    """The first run of a named experiment leaves its config.json: seed 42, no category."""
    path = experiment / "config.json"
    if experiment.name == SCRATCH:
        return
    with locked(experiment, wait=True):
        check_recipe(experiment, config)  # again: another process may have been faster
        if not path.is_file():
            write_atomic(path, config.replace(category=None, seed=SEED).to_json())


def recipe_of(config: Config) -> Config:
    """What runs of one recipe have in common. mvtec is a folder whose categories have names."""
    dataset = "folder" if config.dataset == "mvtec" else config.dataset
    return config.replace(dataset=dataset, category=None, seed=SEED)


# Tables, from the metrics.json files


def read_metrics(path: Path) -> dict:
    """A run's metrics.json; UserError where it is not one that a run has written."""

    def refused(constant: str):
        raise ValueError(f"{constant} is no figure")

    try:
        metrics = json.loads(path.read_text(encoding="utf-8"), parse_constant=refused)
        missing = [key for key in METRICS if key not in metrics]
        missing = missing or [key for key in METRICS if not of_its_kind(key, metrics[key])]
        if not missing and metrics["auroc"] is not None:
            missing = [key for key in ALWAYS if metrics[key] is None]
    except (ValueError, TypeError, RecursionError) as error:
        missing = [str(error)]
    if missing:
        raise UserError(
            f"{path}: not a complete metrics.json ({missing[0]}); remove it, and the command of "
            "that run makes it again"
        )
    return metrics


def of_its_kind(key: str, value) -> bool:
    """Whether a value of metrics.json is of the type that a run writes."""
    if key in ("category", "dataset", "score"):
        return isinstance(value, str)
    if key == "provenance":
        return isinstance(value, dict) and isinstance(value.get("date", ""), str)
    if key == "scores":
        return isinstance(value, dict) and all(of_its_kind(FIGURES[0], v) for v in value.values())
    if key == "seed" or key in COUNTS:
        return type(value) is int
    if value is None:
        return key in FIGURES
    return type(value) in (int, float) and math.isfinite(value)


def write_results(experiment: Path) -> None:
    """Rebuild results.csv and results.md from the runs' metrics.json files."""
    with rewriting(experiment):  # the last of several processes writes what all have done
        rebuild_results(experiment)


@contextlib.contextmanager
def rewriting(experiment: Path):
    """Around the writing of its tables; without what a process left that was killed over it."""
    with locked(experiment, wait=True):
        for name in SHARED:
            for path in experiment.glob(f".{name}.*.tmp"):
                path.unlink()
        yield


def runs_of(
    experiment: Path, refused: Callable[[UserError], None]
) -> Iterator[tuple[Path, dict, Config]]:
    """Folder, metrics and config of every finished run; `refused` is told of one that is damaged.

    A run that another process is making anew meanwhile is left out.
    """
    for path in sorted(experiment.glob("*/seed*/metrics.json")):
        try:
            metrics = read_metrics(path)
            config = configuration.load(path.with_name("config.json"))
            name, seed = metrics["category"], metrics["seed"]
            if path.parent != experiment / name / f"seed{seed}":
                raise UserError(f"{path.parent}: a copy, of {name} seed {seed}")
        except FileNotFoundError:
            continue
        except UserError as error:
            refused(error)
        else:
            yield path.parent, metrics, config


def rebuild_results(experiment: Path) -> None:
    def refused(error):  # which is no reason to stop the others
        print(f"warning: not in the tables of {experiment}: {error}", file=sys.stderr)

    found, recipes = {}, []
    for run, metrics, config in runs_of(experiment, refused):
        found[run] = metrics
        recipes.append(recipe_of(config))
    runs = sorted(found.values(), key=lambda m: (m["seed"], m["category"]))
    # Means are of runs of one config; `local` may hold others.
    alike = not any(configuration.differences(recipe, recipes[0]) for recipe in recipes)
    looks: dict[str, list] = {}
    best = {}  # an oracle: what choosing the checkpoint on the test set would have given
    for run, m in found.items():
        if looked := curves.read(run / "curve.csv"):
            looks.setdefault(run.parent.name, []).append(looked)
            if m["score"] in looked and m["auroc"] is not None:
                best[m["category"], m["seed"]] = max(m["auroc"], *looked[m["score"]].values())
    if looks:
        write_atomic(experiment / "curves.svg", curves.svg(experiment.name, looks))
    write_atomic(experiment / "results.csv", results_csv(runs, alike))
    write_atomic(experiment / "results.md", results_md(experiment.name, runs, alike, best))
