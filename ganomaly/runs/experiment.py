"""The experiment folder: config, log, checkpoint, model, scores, metrics, results tables.

A run is experiments/<name>/<category>/seed<seed>/. Every file but the log and TensorBoard's is
whole or not there. A run is finished when model.pt and metrics.json are both there; metrics.json is
written last.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ganomaly import config as configuration
from ganomaly.batches import to_input
from ganomaly.config import ROOT, Config
from ganomaly.errors import UserError, flag
from ganomaly.files import locked, naming, read_torch, write_atomic, write_torch
from ganomaly.runs import curves
from ganomaly.runs.pictures import panel, png
from ganomaly.runs.provenance import changed_code, code
from ganomaly.runs.results import (
    ALWAYS,
    COUNTS,
    FIGURES,
    METRICS,
    Reference,
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
ANEW = f"{flag('--force')} trains anew, --experiment NAME (EXPERIMENT=NAME) keeps both"


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
            raise UserError(
                f"{self.path('config.json')} is gone; {flag('--force')} trains this run anew"
            )

    def compare(self, theirs: Config) -> None:
        if changed := configuration.differences(self.config, theirs):
            raise UserError(
                f"{self.folder} was made with another config: {', '.join(changed)}; {ANEW}"
            )

    def begin(self, anew: bool) -> None:
        """Make the folder ready: nothing of an older run where `anew`.

        Else what would make the run look finished goes: git keeps metrics.json, but no model.pt.
        """
        for pattern in OURS if anew else OURS[:3]:
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
                changed = changed_code(state.get("code"))
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
            if changed:
                raise UserError(f"{path} is of other code ({changed} changed since); {ANEW}")
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
        origin = {"config": self.config.to_json(), "code": code()}
        write_torch(self.path("last.pt"), {**state, **origin})
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


def check_recipe(experiment: Path, config: Config, forced: Collection[Path] = ()) -> None:
    """A named experiment holds runs of one recipe; UserError where this config is another.

    forced: the folders of the runs that are trained anew, whatever they were. Where no other run
    is left, the experiment takes another recipe.
    """
    path = experiment / "config.json"
    if experiment.name == SCRATCH or not path.is_file():
        return
    if changed := configuration.differences(recipe_of(config), recipe_of(configuration.load(path))):
        runs = [run.parent for run in sorted(experiment.glob("*/seed*/config.json"))]
        others = [f"{run.parent.name} {run.name}" for run in runs if run not in forced]
        if forced and not others:
            return
        kept = f" of {len(others)} more runs, {others[0]} for one" if forced else ""
        raise UserError(f"{path} is another recipe{kept}: {', '.join(changed)}; {ANEW}")


def write_recipe(experiment: Path, config: Config, forced: Collection[Path] = ()) -> None:
    """The first run of a named experiment leaves its config.json: seed 42, no category."""
    path = experiment / "config.json"
    if experiment.name == SCRATCH:
        return
    with locked(experiment, wait=True):
        check_recipe(experiment, config, forced)  # again: another process may have been faster
        recipe = config.replace(category=None, seed=SEED)
        if not path.is_file() or configuration.differences(recipe, configuration.load(path)):
            write_atomic(path, recipe.to_json())


def recipe_of(config: Config) -> Config:
    """What runs of one recipe have in common."""
    return config.replace(category=None, seed=SEED)


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


def write_results(experiment: Path, recipe: str | None = None) -> None:
    """Rebuild results.csv, results.md and curves.svg from the files of the runs.

    recipe: whose committed table stands beside the figures; see reference_of.
    """
    with rewriting(experiment):  # the last of several processes writes what all have done
        table = read_table(experiment)
        if table.looks:
            write_atomic(experiment / "curves.svg", curves.svg(experiment.name, table.looks))
        write_atomic(experiment / "results.csv", results_csv(table.runs, table.alike))
        write_atomic(experiment / "results.md", markdown(experiment, table, recipe))


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


@dataclass
class Table:
    """The finished runs of an experiment."""

    runs: list[dict]  # metrics, by seed and category
    alike: bool  # all of one recipe; `local` may hold several, and then there are no means
    looks: dict[str, list]  # category -> its seeds' curves
    best: dict[
        tuple[str, int], float
    ]  # (category, seed) -> AUROC of the best checkpoint, an oracle


def read_table(experiment: Path, only: Collection[tuple[str, int]] | None = None) -> Table:
    """The table of an experiment, or of those of its runs whose category and seed `only` has."""

    def refused(error):  # which is no reason to stop the others
        print(f"warning: not in the tables of {experiment}: {error}", file=sys.stderr)

    runs, recipes = [], []
    looks: dict[str, list] = {}
    best = {}
    for run, metrics, config in runs_of(experiment, refused):
        key = metrics["category"], metrics["seed"]
        if only is not None and key not in only:
            continue
        runs.append(metrics)
        recipes.append(recipe_of(config))
        if looked := curves.read(run / "curve.csv"):
            looks.setdefault(run.parent.name, []).append(looked)
            if metrics["score"] in looked and metrics["auroc"] is not None:
                best[key] = max(metrics["auroc"], *looked[metrics["score"]].values())
    runs.sort(key=lambda m: (m["seed"], m["category"]))
    alike = not any(configuration.differences(recipe, recipes[0]) for recipe in recipes)
    return Table(runs, alike, looks, best)


def markdown(experiment: Path, table: Table, recipe: str | None = None) -> str:
    """A table for people, the reference beside it where there is one."""
    reference = reference_of(experiment, recipe)
    return results_md(experiment.name, table.runs, table.alike, table.best, reference)


def reference_of(experiment: Path, recipe: str | None = None) -> Reference | None:
    """The committed table of a recipe, by default of the experiment's name, as local/paper has it.

    None where there is none, and for the committed experiment itself.
    """
    folder = ROOT / "experiments" / (recipe or experiment.name)
    if not (folder / "results.csv").is_file() or folder.resolve() == experiment.resolve():
        return None
    try:
        ours, theirs = (configuration.load(f / "config.json") for f in (experiment, folder))
        with open(folder / "results.csv", encoding="utf-8") as file:
            figures = {
                (row["category"], int(row["seed"])): float(row["auroc"])
                for row in csv.DictReader(file)
            }
    except (UserError, ValueError, KeyError, TypeError):  # an experiment without a recipe
        return None
    return Reference(folder.name, figures, configuration.differences(ours, theirs))
