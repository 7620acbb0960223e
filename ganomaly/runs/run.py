"""One run's folder, experiments/<name>/<category>/seed<seed>/, and what train() records there.

Every file but the log and TensorBoard's is whole or not there. A run is finished when model.pt and
metrics.json are both there; metrics.json is written last. Then last.pt is deleted.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ganomaly.config import Config, differences, from_json
from ganomaly.errors import UserError, flag
from ganomaly.files import read_torch, write_atomic, write_torch
from ganomaly.runs.pictures import encoded, panel
from ganomaly.runs.provenance import changed_code, code
from ganomaly.runs.results import EMPTY, METRICS, csv_text
from ganomaly.scoring import Outputs
from ganomaly.training import LOG_EVERY

ANEW = f"{flag('--force')} trains anew, --experiment NAME (EXPERIMENT=NAME) keeps both"


class Run:
    """The folder of a run and the files in it."""

    def __init__(self, experiment: Path, category: str, config: Config):
        self.experiment, self.config = experiment, config
        self.name = f"{category} seed {config.seed}"
        self.folder = experiment / category / f"seed{config.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").is_file() and (self.folder / "model.pt").is_file()

    def begin(self, anew: bool) -> None:
        """Delete what makes a run look finished; with `anew` also what a run is resumed from."""
        old = ["last.pt", "curve.csv", "events.out.tfevents.*"] if anew else []
        for pattern in (".*.tmp", "model.pt", "metrics.json", *old):
            for path in self.folder.glob(pattern):
                path.unlink()
        write_atomic(self.folder / "config.json", self.config.to_json())

    def write_samples(self, o: Outputs) -> None:
        """samples.png: images, reconstructions, differences (white: a quarter of the range)."""
        pixels = (panel(o.x, o.x_hat) * 255).round().byte().permute(1, 2, 0).numpy()
        image, scale = Image.fromarray(pixels), max(1, 64 // self.config.image_size)
        larger = image.resize([side * scale for side in image.size], Image.Resampling.NEAREST)
        write_atomic(self.folder / "samples.png", encoded(larger))


def refuse_other(config: Config, made_with: Config, path: Path) -> None:
    """UserError where what is at the path was made with another config."""
    if changed := differences(config, made_with):
        raise UserError(f"{path} is of another config: {', '.join(changed)}; {ANEW}")


def read_metrics(folder: Path) -> dict:
    """A run's metrics.json in one level, scores as auroc_<name>; UserError where it is damaged."""
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if missing := METRICS - metrics.keys():
            raise ValueError(f"no {min(missing)}")
        scores = {f"auroc_{name}": value for name, value in metrics["scores"].items()}
        # An older run may lack a newer figure
        return {**EMPTY, **metrics, **scores, **metrics["provenance"]}
    except (ValueError, AttributeError, RecursionError, TypeError) as error:
        text = f"{path}: not a complete metrics.json ({error}); remove it and train again"
        raise UserError(text) from None


class Recorder:
    """What train() asks for: checkpoints, log, looks and progress, in the folder of a run."""

    def __init__(self, run: Run, look: Callable, bar: tqdm):
        self.run, self.look, self.progress = run, look, bar
        self.board: SummaryWriter | None = None
        self.curve: list[list] = []  # rows of curve.csv

    def load(self) -> dict | None:
        """The last checkpoint, or None; log.jsonl and TensorBoard go on from its step."""
        path, state, step = self.run.folder / "last.pt", None, 0
        if path.is_file():
            try:
                state = read_torch(path)
            except ValueError:
                raise UserError(f"{path}: damaged; remove it, and training starts anew") from None
            if changed := changed_code(state.get("code")):
                raise UserError(f"{path} is of other code ({changed} changed since); {ANEW}")
            refuse_other(self.run.config, from_json(state["config"]), path)
            self.curve, step = state["curve"], state["step"]
            print(f"{self.run.name}: going on from step {step}", file=sys.stderr)
            self.progress.update(step)
        log = self.run.folder / "log.jsonl"
        lines = log.read_text(errors="replace").splitlines(True) if log.is_file() else []
        write_atomic(log, "".join(lines[: step // LOG_EVERY]))
        self.board = SummaryWriter(self.run.folder, purge_step=step + 1)
        self.board.add_text("config", f"```\n{self.run.config.to_json()}```", step)
        return state

    def save(self, state: dict) -> None:
        state |= {"config": self.run.config.to_json(), "code": code(), "curve": self.curve}
        write_torch(self.run.folder / "last.pt", state)

    def log(self, record: dict) -> None:
        step = record["step"]
        with open(self.run.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for key in record.keys() - {"step"}:
            group = "speed" if key == "images_per_second" else "loss"
            self.board.add_scalar(f"{group}/{key}", record[key], step)
        # The two that say most, and short enough for a terminal
        text = f"loss_d {record['discriminator']:.4f}, contextual {record['contextual']:.4f}"
        speed = f"{record['images_per_second']:.0f} images/s"
        self.progress.set_postfix_str(f"{text}, {speed}")
        if self.progress.disable:
            config = self.run.config
            left = (config.steps - step) * config.batch_size / record["images_per_second"]
            done = f"{self.run.name}: step {step}/{config.steps}"
            print(f"{done}, {text}, {speed}, {left / 60:.1f} min left", file=sys.stderr)

    def preview(self, step: int, networks: dict, scale: float | None) -> None:
        """Adds a row to curve.csv, on which no choice depends; TensorBoard has more."""
        aurocs, o = self.look(networks, scale)
        if aurocs:
            self.curve.append([step, *aurocs.values()])
            write_atomic(self.run.folder / "curve.csv", csv_text(["step", *aurocs], self.curve))
        for name, value in aurocs.items():
            self.board.add_scalar(f"auroc/{name}", value, step)
        self.board.add_image("reconstructions", panel(o.x, o.x_hat), step)
        self.board.add_histogram("latent/z", o.z, step)
        self.board.add_histogram("latent/z - z_hat", o.z - o.z_hat, step)
        self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
