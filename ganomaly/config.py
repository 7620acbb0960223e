"""Every knob of a run in one flat, frozen, documented dataclass, and its JSON form.

The defaults train as the recipe `paper` does. Paths and the device are flags of the scripts and no
part of a config, so no path is ever saved.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
from dataclasses import dataclass, field
from pathlib import Path

from ganomaly.errors import UserError
from ganomaly.scoring import SCORES

ROOT = Path(__file__).resolve().parent.parent  # the clone
EXPERIMENTS = ROOT / "experiments"  # the recipes, and the tables that git keeps
FOLDERS = ("mvtec", "folder")  # image files in folders; the categories of mvtec have fixed names
DATASETS = ("digits", "mnist", "cifar10", *FOLDERS)

# Defaults that a dataset changes. MNIST and CIFAR-10 follow the paper's protocol: 32 px, and the
# 15 epochs of batch 64 of the released code, as steps.
DATASET_DEFAULTS: dict[str, dict] = {
    "digits": dict(
        category="0", image_size=32, channels=1, width=32, batch_size=32, steps=600,
        checkpoint_every=200,
    ),
    "mnist": dict(image_size=32, channels=1, batch_size=64, steps=11_800),
    "cifar10": dict(image_size=32, batch_size=64, steps=10_100),
}  # fmt: skip


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
LIMITS = {
    "low": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "high": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def knob(default, help: str, **limits):
    """A field of Config. limits: some of LIMITS, or the choices."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Config:
    """One run. Construction checks every value; UserError names the key and what is allowed."""

    dataset: str = knob("mvtec", "[mvtec with a category, else digits]", choices=DATASETS)
    category: str | None = knob(
        None, "a folder of images; in a labelled set the class that is the anomaly"
    )
    image_size: int = knob(64, "side of the images, pixels", choices=(32, 64, 128, 256, 512, 1024))
    channels: int = knob(3, "3 for colour, 1 for grey", choices=(1, 3))
    normalise: str = knob(
        "none", "exposure divides each image by its mean brightness", choices=("none", "exposure")
    )
    width: int = knob(64, "channels of the first convolution", low=1, high=1024)
    latent_dim: int = knob(100, "length of z and z_hat", low=1, high=65_536)
    extra_layers: int = knob(0, "3x3 convolutions after the first block", low=0, high=16)
    comparator_width: int = knob(0, "the comparator's width; 0: no comparator", low=0, high=1024)
    comparator_noise: float = knob(
        0.0, "noise on the codes that it learns from, in their standard deviations", low=0, high=10
    )
    corrupted: float = knob(0.0, "share of each batch to corrupt and restore", low=0, below=1)
    batch_size: int = knob(16, "images per step", low=1, high=65_536)
    steps: int = knob(3000, "training steps, the same for every category", low=1, high=10**9)
    lr: float = knob(2e-4, "Adam's learning rate of generator and discriminator", above=0, high=1)
    beta1: float = knob(0.5, "Adam's beta1 of generator and discriminator", low=0, below=1)
    ema_decay: float = knob(0.99, "decay of the running average; 0: no average", low=0, below=1)
    w_adv: float = knob(1.0, "weight of the adversarial (feature matching) loss", low=0, high=1e6)
    w_con: float = knob(50.0, "weight of the contextual loss", low=0, high=1e6)
    w_enc: float = knob(1.0, "weight of the encoder loss", low=0, high=1e6)
    amp: str = knob(
        "auto",
        "precision; auto: bf16 if the device has it, else fp16 on CUDA, fp32 on a CPU",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    score: str = knob("latent", "the headline anomaly score", choices=SCORES)
    tta: bool = knob(False, "test-time augmentation: average over moved copies")
    quantile: float = knob(0.95, "share of normal images under the threshold", above=0, below=1)
    calibration_fraction: float = knob(0.2, "share of the good images held out", above=0, below=1)
    checkpoint_every: int = knob(500, "steps between checkpoints", low=1, high=10**9)
    threads: int = knob(1, "CPU threads; results depend on their number", low=1, high=1024)
    seed: int = knob(42, "seed of every random draw", low=0, high=2**32 - 1)

    def __post_init__(self):
        for key in FIELDS.values():
            value, kind, limits = getattr(self, key.name), str(key.type).split()[0], key.metadata
            if kind == "float" and type(value) is int and abs(value) < 1e300:
                value = float(value)
                object.__setattr__(self, key.name, value)
            fits = (
                type(value).__name__ == kind
                and value in limits.get("choices", [value])
                and (kind != "float" or math.isfinite(value))
                and all(holds(value, limits[k]) for k, (_, holds) in LIMITS.items() if k in limits)
            )
            if not fits and (value, key.default) != (None, None):
                raise UserError(f"{key.name}: {value!r} is not allowed; allowed: {allowed(key)}")
        weights = [name for name in FIELDS if name.startswith("w_")]
        if not any(getattr(self, name) for name in weights):
            raise UserError(f"{', '.join(weights)}: all are 0, one must be positive to train")
        if self.comparator_width and not self.n_corrupted:
            raise UserError("comparator_width: no image of a batch is corrupted; raise corrupted")
        if self.score not in self.scores:
            raise UserError(f"score: {self.score} needs a comparator_width of more than 0")
        if self.category is not None and not is_name(self.category):
            raise UserError(f"category: {self.category!r} is not a plain folder name")

    @property
    def n_corrupted(self) -> int:
        """Corrupted images of a batch; always less than the batch."""
        return int(self.corrupted * self.batch_size)

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the anomaly scores that a model of this config computes."""
        return tuple(s for s in SCORES if s != "comparator" or self.comparator_width)

    def replace(self, **changes) -> Config:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


FIELDS = {key.name: key for key in dataclasses.fields(Config)}


def is_name(text: str) -> bool:
    """Whether text is a plain folder name, so that no path leads out of the parent folder."""
    return text not in ("", ".", "..") and text.isprintable() and not set(text) & set("/\\")


def allowed(key: dataclasses.Field) -> str:
    """The values that a field may have, in words."""
    if "choices" in key.metadata:
        return ", ".join(map(str, key.metadata["choices"]))
    limits = [f"{words} {key.metadata[k]}" for k, (words, _) in LIMITS.items() if k in key.metadata]
    return ", ".join([KINDS[str(key.type).split()[0]], *limits])


def resolve(values: dict) -> Config:
    """A Config from given values; the dataset's defaults fill the rest."""
    # A category of None counts as not given
    given = {k: v for k, v in values.items() if not (k == "category" and v is None)}
    dataset = given.setdefault("dataset", "mvtec" if "category" in given else "digits")
    return Config(**{**DATASET_DEFAULTS.get(str(dataset), {}), **given})


def from_json(text: str | bytes, source="config") -> Config:
    """A Config from JSON text; errors start with the source. See resolve for missing keys."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise UserError("a config is a JSON object of keys and values")
        for name in values:
            if name not in FIELDS:
                raise UserError(f"unknown key {name!r}; {nearest(name, FIELDS)}")
        return resolve(values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not a JSON config: {error}") from None


def load_config(path: Path) -> Config:
    return from_json(path.read_bytes(), path)


def nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)


def differences(ours: Config, theirs: Config) -> list[str]:
    """The fields that differ and change results, as 'name (theirs there, ours asked)'."""
    same = {"checkpoint_every"}  # changes no score
    if ours.dataset in FOLDERS and theirs.dataset in FOLDERS:
        same.add("dataset")  # the same images by another name
    if "auto" in (ours.amp, theirs.amp):
        same.add("amp")  # a recipe for every machine, and a run of one
    return [
        f"{name} ({getattr(theirs, name)} there, {getattr(ours, name)} asked)"
        for name in FIELDS
        if name not in same and getattr(ours, name) != getattr(theirs, name)
    ]
