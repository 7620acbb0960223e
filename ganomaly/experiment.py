"""The experiment folder: config, log, checkpoint, model, scores, metrics, results tables.

A run is experiments/<name>/<category>/seed<seed>/. Every file but the log and TensorBoard's is
written to a temporary name, fsynced and renamed. A run is finished when metrics.json and model.pt
are both there.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ganomaly import config as configuration
from ganomaly.config import Config
from ganomaly.errors import UserError

SCRATCH = "local"  # the experiment of make train: runs of any config, ignored by git
SEED = 42  # of a recipe's config.json


@contextlib.contextmanager
def naming(path: Path):
    """A write that fails, on a full disk for one, says no file: say which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_torch(path: Path, state: dict) -> None:
    buffer = io.BytesIO()  # so that a full disk is an OSError that names the file
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def csv_text(header: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()


class Run:
    """One run's folder; the log and checkpoint that train() takes."""

    def __init__(self, experiment: Path, category: str, config: Config):
        self.config, self.name = config, f"{category} seed {config.seed}"
        self.folder = experiment / category / f"seed{config.seed}"
        self.progress: tqdm = tqdm(disable=True)  # the caller's bar, where there is one
        self.preview_images: Tensor | None = None  # uint8, for TensorBoard's reconstructions
        self.board = None

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def finished(self) -> bool:
        return self.path("metrics.json").is_file() and self.path("model.pt").is_file()

    def check(self) -> None:
        """UserError where the folder holds a run of another config."""
        if self.path("config.json").is_file():
            theirs = configuration.load(self.path("config.json"))
            if changed := configuration.differences(self.config, theirs):
                raise UserError(
                    f"{self.folder} was made with another config: {', '.join(changed)}; "
                    "--force trains it anew, --experiment NAME keeps both"
                )

    def begin(self, anew: bool) -> None:
        """Make the folder ready: nothing of an older run where `anew`."""
        if anew and self.folder.is_dir():
            # metrics.json first: what is left half removed is not finished.
            for path in sorted(self.folder.iterdir(), key=lambda p: p.name != "metrics.json"):
                path.unlink()
        for left in self.folder.glob(".*.tmp"):  # of a killed process
            left.unlink()
        write_atomic(self.path("config.json"), self.config.to_json())

    # What train() calls

    def load(self) -> dict | None:
        """The last checkpoint, or None; log.jsonl and TensorBoard go on from its step."""
        path, state = self.path("last.pt"), None
        if path.is_file():
            content = path.read_bytes()
            try:
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception:  # whatever a damaged archive makes torch.load raise
                aside = path.with_name("last.damaged.pt")
                os.replace(path, aside)
                print(
                    f"warning: {path} is damaged; set aside as {aside.name}, training starts anew",
                    file=sys.stderr,
                )
        from torch.utils.tensorboard import SummaryWriter  # late: it takes a second to import

        step = state["step"] if state else 0
        write_atomic(self.path("log.jsonl"), "".join(kept_lines(self.path("log.jsonl"), step)))
        with naming(self.folder):
            self.board = SummaryWriter(self.folder, purge_step=step + 1)
            self.board.add_text("config", f"```\n{self.config.to_json()}```", step)
        return state

    def save(self, state: dict) -> None:
        write_torch(self.path("last.pt"), state)

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
    def preview(self, step: int, generator: torch.nn.Module) -> None:
        """Reconstructions of the preview images to TensorBoard."""
        device = next(generator.parameters()).device
        x = self.preview_images.to(device).float() / 127.5 - 1
        x_hat = generator.eval()(x)[1]
        with naming(self.folder):
            self.board.add_image("reconstructions", panel(x, x_hat), step)
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
        image, buffer = Image.fromarray(pixels), io.BytesIO()
        scale = max(1, 64 // x.shape[-1])
        image.resize([side * scale for side in image.size], Image.Resampling.NEAREST).save(
            buffer, "png"
        )
        write_atomic(self.path("samples.png"), buffer.getvalue())

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
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.is_file() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            pass
    return kept


def panel(x: Tensor, x_hat: Tensor) -> Tensor:
    """(3, H, W) in [0, 1]: a row of images, of reconstructions, of mean absolute differences."""
    from torchvision.utils import make_grid

    difference = ((x - x_hat).abs().mean(1, keepdim=True) / 0.5).expand_as(x)
    rows = torch.cat([(x + 1) / 2, (x_hat + 1) / 2, difference])
    return make_grid(rows.float().cpu(), nrow=len(x), padding=1, pad_value=0.5).clamp(0, 1)


# The recipe of an experiment


def check_recipe(experiment: Path, config: Config) -> None:
    """A named experiment holds runs of one recipe; UserError where this config is another.

    Its first run writes config.json, with seed 42 and no category.
    """
    path = experiment / "config.json"
    if experiment.name == SCRATCH or not path.is_file():
        return
    ignore = ("dataset", "category", "seed", "checkpoint_every")
    if changed := configuration.differences(config, configuration.load(path), ignore):
        raise UserError(
            f"{path} is another recipe: {', '.join(changed)}; choose another --experiment"
        )


def write_recipe(experiment: Path, config: Config) -> None:
    path = experiment / "config.json"
    if experiment.name != SCRATCH and not path.is_file():
        write_atomic(path, config.replace(category=None, seed=SEED).to_json())


# Tables, from the metrics.json files


def read_metrics(path: Path) -> dict:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return {**metrics, "category": str(metrics["category"]), "seed": int(metrics["seed"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a metrics.json ({error}); --force trains the run anew"
        ) from None


def write_results(experiment: Path) -> None:
    """Rebuild results.csv and results.md from the runs' metrics.json files."""
    from ganomaly.results import results_csv, results_md

    found = [read_metrics(path) for path in sorted(experiment.glob("*/seed*/metrics.json"))]
    runs = sorted(found, key=lambda m: (m["seed"], m["category"]))
    write_atomic(experiment / "results.csv", results_csv(runs))
    write_atomic(experiment / "results.md", results_md(experiment.name, runs))


def samples_of(labels: np.ndarray, most: int = 8) -> np.ndarray:
    """Indices of up to `most` good and `most` defective images, evenly spread."""
    groups = [np.flatnonzero(labels == label) for label in (0, 1)]
    picks = [g[np.unique(np.linspace(0, len(g) - 1, most).round().astype(int))] for g in groups]
    return np.concatenate(picks)
