"""Where images come from: MVTec AD, any folder of its layout, MNIST, CIFAR-10, sklearn's digits.

load(config, ...) returns a Category of uint8 tensors, decoded once and kept in memory. A label
comes from the name `good`, never from a sort order.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ganomaly.config import Config, is_name, nearest
from ganomaly.errors import UserError
from ganomaly.files import locked
from ganomaly.images import (
    SUFFIXES,
    check_memory,
    image_files,
    note_others,
    read_images,
    to_pixels,
)

MVTEC = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill",
    "screw", "tile", "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip
CIFAR10 = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEN = tuple("0123456789")
CLASSES = {"mvtec": MVTEC, "digits": TEN, "mnist": TEN, "cifar10": CIFAR10}
MIN_CALIBRATION = MIN_TRAIN = 10


@dataclass(frozen=True)
class Category:
    """Images (N, C, S, S) in uint8; test is empty where there was nothing to evaluate on."""

    name: str
    train: Tensor
    calibration: Tensor  # normal images that training never sees
    test: Tensor
    test_labels: np.ndarray  # (N,) 0 normal, 1 defective
    test_defects: list[str]  # "good" or the defect's name
    test_paths: list[str]  # relative to the category's folder
    test_masks: Tensor | None = None  # bool (N, S, S), defective pixels; None where there are none


def load(config: Config, data_root: Path | None = None, download: bool = False) -> Category:
    """The images of one run. UserError where they are missing, unreadable or too few."""
    root = data_root_of(config.dataset, data_root)
    if config.dataset in ("mvtec", "folder"):
        return load_folder(config, root)
    check_class(config)
    if config.dataset == "digits" and data_root is not None:
        print(
            "note: the digits need no --data-root; --category or --dataset folder takes images",
            file=sys.stderr,
        )
    return load_one_class_out(config, *arrays(config.dataset, root, download))


def data_root_of(dataset: str, data_root: Path | None) -> Path:
    return Path(data_root or ("data/mvtec" if dataset == "mvtec" else "data"))


def check_class(config: Config) -> None:
    known = CLASSES[config.dataset]
    if config.category is None:
        raise UserError(f"category: {config.dataset} needs one of {', '.join(known)}")
    if config.category not in known:
        hint = nearest(config.category, known)
        having = [dataset for dataset, names in CLASSES.items() if config.category in names]
        others = ", ".join(having) + " has it" if having else "folder takes any name"
        raise UserError(
            f"category: {config.dataset} has no {config.category!r}; {hint}; --dataset {others}"
        )


# Folders: MVTec AD's layout


def category_name(config: Config, data_root: Path | None) -> str:
    """The name of a run's category: the root's own name where the root itself is the category."""
    name = config.category or Path(os.path.realpath(data_root_of(config.dataset, data_root))).name
    if not is_name(name):
        raise UserError(f"--data-root: {name!r} cannot name a run's folder; rename it")
    return name


def category_folder(config: Config, data_root: Path | None) -> Path:
    """The category's folder; UserError where there is nothing in it to train on."""
    root = data_root_of(config.dataset, data_root)
    if config.dataset == "mvtec":
        check_class(config)
    folder = root / config.category if config.category else root
    good = folder / "train" / "good"
    if good.is_dir() or (config.dataset == "folder" and train_folder(folder) == folder):
        return folder
    if config.dataset == "mvtec":
        to = "" if data_root is None else f" DATA_ROOT={shlex.quote(str(root))}"
        mend = f"get MVTec AD (4.9 GB, CC BY-NC-SA 4.0, not for commercial use): make download{to}"
    else:
        mend = f"put images of good parts there or into {folder}, or name another --data-root"
    deeper = sorted(root.glob(f"*/{glob.escape(folder.name)}/train/good"))
    if deeper:
        mend = f"there is one for --data-root {deeper[0].parent.parent.parent}"
    there = categories_in(root)
    also = f"; categories there: {', '.join(there)}" if there else ""
    raise UserError(f"no folder {good}{also}; {mend}")


def train_folder(folder: Path) -> Path:
    """Where a category's normal images are: train/good, else, where it has images, the folder."""
    good = folder / "train" / "good"
    return folder if not good.is_dir() and folder.is_dir() and image_files(folder) else good


def categories_in(root: Path) -> list[str]:
    return sorted(path.parent.parent.name for path in root.glob("*/train/good"))


def categories_of(config: Config, data_root: Path | None) -> list[str]:
    """All categories of a data set; those of a folder are its sub-folders with a train/good."""
    if config.dataset != "folder":
        return list(CLASSES[config.dataset])
    root = data_root_of(config.dataset, data_root)
    if not (found := categories_in(root)):
        raise UserError(f"{root}: no <category>/train/good in this folder; see --data-root")
    return found


def missing_categories(
    config: Config, names: list[str], data_root: Path | None, download: bool = False
) -> dict[str, str]:
    """Those of the categories whose images are not there, with the reason."""
    missing = {}
    for name in names:
        one = config.replace(category=name)
        if config.dataset != "folder":
            check_class(one)
        try:
            if config.dataset in ("mvtec", "folder"):
                category_folder(one, data_root)
            else:
                arrays(config.dataset, data_root_of(config.dataset, data_root), download)
        except UserError as error:
            missing[name] = str(error)
    return missing


def told(missing: dict[str, str], names: list[str]) -> str:
    """What missing_categories found of `names`, and that it stops a command."""
    return (
        f"data of {len(missing)} of {len(names)} categories is missing ({', '.join(missing)}), "
        "nothing was trained"
    )


def train_files(config: Config, data_root: Path | None) -> str | None:
    """A hash of the training files' names and sizes; None where there is no such folder.

    Cheap enough to tell a finished run's images from others of the same name.
    """
    if config.dataset not in ("mvtec", "folder"):
        return None
    try:
        files = image_files(train_folder(category_folder(config, data_root)))
    except UserError:
        return None
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def load_folder(config: Config, root: Path) -> Category:
    folder = category_folder(config, root)
    good = train_folder(folder)
    train = image_files(good)
    check_train_size(len(train), config, good)
    test = []
    if (folder / "test").is_dir():
        for sub in sorted(p for p in (folder / "test").iterdir() if p.is_dir()):
            if not sub.name.startswith("."):
                test += [(path, sub.name) for path in image_files(sub)]
        for kind, found in (
            ("images in test/good", any(defect == "good" for _, defect in test)),
            ("defective images in test/<defect>", any(defect != "good" for _, defect in test)),
        ):
            if not found:
                raise UserError(
                    f"{folder / 'test'}: no {kind}, so nothing can be evaluated; "
                    "add some, or take test/ away to train and calibrate only"
                )
    note_others(folder, [*good.glob("*"), *folder.glob("test/*/*")])
    kept, held_out = split_calibration(len(train), config)
    # In the order in which they are cut apart, so that no part is a copy
    paths = [train[i] for i in torch.cat([kept, held_out])] + [path for path, _ in test]
    pixels = read_images(paths, config.image_size, config.channels)
    return Category(
        name=category_name(config, root),
        train=pixels[: len(kept)],
        calibration=pixels[len(kept) : len(train)],
        test=pixels[len(train) :],
        test_labels=np.array([int(defect != "good") for _, defect in test], dtype=np.int64),
        test_defects=[defect for _, defect in test],
        test_paths=[path.relative_to(folder).as_posix() for path, _ in test],
        test_masks=load_masks(folder, test, config.image_size),
    )


def load_masks(folder: Path, test: list[tuple[Path, str]], image_size: int) -> Tensor | None:
    """ground_truth/<defect>/<image>_mask.png as bool (N, S, S); None unless all are there.

    A pixel of the network's size is defective where at least half of it is. Good images have none.
    """
    names = [folder / "ground_truth" / defect / path.stem for path, defect in test]
    found = {
        i: next((p for p in (Path(f"{name}_mask.png"), Path(f"{name}.png")) if p.is_file()), None)
        for i, (name, (_, defect)) in enumerate(zip(names, test))
        if defect != "good"
    }
    absent = [names[i] for i, path in found.items() if path is None]
    if absent:
        if len(absent) < len(found):
            print(
                f"note: {folder}: {len(absent)} of {len(found)} defective images have no mask "
                f"(the first: {absent[0]}_mask.png), so no figures of pixels",
                file=sys.stderr,
            )
        return None
    masks = torch.zeros(len(test), image_size, image_size, dtype=torch.bool)
    if found:
        masks[list(found)] = read_images(list(found.values()), image_size, 1)[:, 0] >= 128
    return masks if found else None


# One class of a labelled set as the anomaly (the paper's MNIST and CIFAR-10 protocol)


@functools.lru_cache(maxsize=1)  # a benchmark asks for the same ones for every class
def arrays(dataset: str, root: Path, download: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Images (h, w) or (h, w, 3) in uint8 and their class numbers, train and test pooled."""
    if dataset == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return list(np.rint(digits.images * 255 / 16).astype(np.uint8)), digits.target
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[dataset]
    try:
        with locked(root, wait=True, tidy=True) if download else contextlib.nullcontext():
            parts = [kind(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, ValueError, EOFError, AssertionError, URLError) as error:
        # not there, damaged, offline
        folder = root / {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py"}[dataset]
        reason = " ".join(str(error).split())
        mend = reason if download else "--download fetches it"
        raise UserError(f"no complete {dataset} in {folder}; {mend}") from None
    images = [np.asarray(image) for part in parts for image in part.data]
    return images, np.concatenate([np.asarray(part.targets) for part in parts])


def load_one_class_out(config: Config, images: list[np.ndarray], classes: np.ndarray) -> Category:
    """The other nine classes are normal, split 80/20 by the seed; the anomalies are all tested."""
    names = CLASSES[config.dataset]
    anomaly = names.index(config.category)
    normal = torch.from_numpy(np.flatnonzero(classes != anomaly))
    shuffled = normal[torch.randperm(len(normal), generator=seeded(config))]
    n_train = round(0.8 * len(normal))
    check_train_size(n_train, config, config.dataset)
    train, test_good = shuffled[:n_train].sort().values, shuffled[n_train:].sort().values
    test = np.concatenate([test_good.numpy(), np.flatnonzero(classes == anomaly)])
    kept, held_out = split_calibration(n_train, config)
    # In the order in which they are cut apart, so that no part is a copy
    order = [*train[kept].tolist(), *train[held_out].tolist(), *test]
    check_memory(len(order), config.image_size, config.channels)
    pixels = torch.empty((len(order), config.channels, *[config.image_size] * 2), dtype=torch.uint8)
    for place, i in zip(pixels, order):
        image = to_pixels(Image.fromarray(images[i]), config.image_size, config.channels)
        place.copy_(torch.from_numpy(image))
    labels = (classes[test] == anomaly).astype(np.int64)
    return Category(
        name=config.category,
        train=pixels[: len(kept)],
        calibration=pixels[len(kept) : n_train],
        test=pixels[n_train:],
        test_labels=labels,
        test_defects=[names[anomaly] if label else "good" for label in labels],
        test_paths=[f"{names[classes[i]]}/{i:05d}" for i in test],
    )


# Calibration split


def seeded(config: Config) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)


def calibration_size(n: int, config: Config) -> int:
    return max(MIN_CALIBRATION, round(config.calibration_fraction * n))


def check_train_size(n: int, config: Config, where) -> None:
    held_out = calibration_size(n, config)
    if n == 0:
        raise UserError(f"{where}: no images ({', '.join(sorted(SUFFIXES))}) in this folder")
    if n - held_out < MIN_TRAIN:
        least = held_out == MIN_CALIBRATION
        enough = f"at least {MIN_TRAIN + held_out} are needed"
        mend = enough if least else "lower --calibration-fraction"
        raise UserError(
            f"{where}: {n} training images; calibration takes {held_out} and training needs "
            f"{MIN_TRAIN}: {mend}"
        )


def split_calibration(n: int, config: Config) -> tuple[Tensor, Tensor]:
    """Indices of 0..n-1 to train on and to calibrate with, drawn by the seed, each sorted."""
    order = torch.randperm(n, generator=seeded(config))
    held_out = calibration_size(n, config)
    return order[held_out:].sort().values, order[:held_out].sort().values
