"""Where images come from: MVTec AD, any folder of its layout, MNIST, CIFAR-10, sklearn's digits.

load(config, ...) returns a Category of uint8 tensors, decoded once and kept in memory. Labels come
from the folder name `good`, never from a sort order.
"""

import contextlib
import functools
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ganomaly.config import FOLDERS, Config
from ganomaly.errors import UserError, flag, reason_of
from ganomaly.files import locked
from ganomaly.images import FULL_SCALES, Kind, kind_of, note_odd, read_images, to_pixels
from ganomaly.masks import load_masks, mask_files
from ganomaly.paths import THUMBNAILS, image_files, note_left_out

MVTEC = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill",
    "screw", "tile", "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip
CIFAR10 = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEN = tuple("0123456789")
CLASSES = {"mvtec": MVTEC, "digits": TEN, "mnist": TEN, "cifar10": CIFAR10}
MIN_CALIBRATION = MIN_TRAIN = 10
HINTS = {
    "mvtec": "get MVTec AD (5.3 GB, CC BY-NC-SA 4.0, not for commercial use): make download",
    "folder": "put images of good parts there, or name another --data-root",
}


class Missing(UserError):
    """The images of a category are not there."""


@dataclass(frozen=True)
class Category:
    """Images (N, C, S, S) in uint8. Without test images, test has length 0."""

    name: str
    train: Tensor
    calibration: Tensor  # normal images that training never sees
    test: Tensor
    test_labels: np.ndarray  # (N,) 0 normal, 1 defective
    test_defects: list[str]  # "good" or the defect's name
    test_paths: list[str]  # relative to the category's folder
    test_masks: Tensor | None = None  # bool (N, S, S), defective pixels; None without mask files
    kind: Kind = Kind()  # what the training images have in common


def load(config: Config, data_root: Path | None = None, download: bool = False) -> Category:
    """The images of one run. UserError where they are missing, unreadable or too few."""
    folder = category_folder(config, data_root)
    if folder is None:
        return load_one_class_out(config, *arrays(config.dataset, data_root, download))
    return load_folder(config, folder, category_name(config, data_root))


def data_root_of(dataset: str, data_root: Path | None) -> Path:
    return Path(data_root or ("data/mvtec" if dataset == "mvtec" else "data"))


def category_name(config: Config, data_root: Path | None) -> str:
    """The name of a run's category: without --category the name of the root folder."""
    root = data_root_of(config.dataset, data_root)
    return config.category or os.path.basename(os.path.abspath(root))


def category_folder(config: Config, data_root: Path | None) -> Path | None:
    """The category's folder; None for digits, MNIST and CIFAR-10, which have none.

    No image is read. UserError where there is no such category, or no image in it to train on.
    """
    known = CLASSES.get(config.dataset)
    if known and config.category not in known:
        names = f"{', '.join(known)}, not {config.category}"
        message = f"category: {config.dataset} needs one of {names}"
        raise UserError(f"{message}; --dataset names another data set")
    if config.dataset not in FOLDERS:
        return None
    root = data_root_of(config.dataset, data_root)
    folder = root / config.category if config.category else root
    if train_files(folder):
        return folder
    hint = HINTS[config.dataset]
    if (there := categories_in(root)) and config.dataset == "mvtec" and not {*there} & {*MVTEC}:
        hint = f"{root} has {', '.join(there)}; for them add --dataset folder (DATASET=folder)"
    elif there:
        hint = f"categories there: {', '.join(there)}; choose one with --category (CATEGORY=)"
    elif train_files(root):
        hint = f"{root} is a category itself: name its parent, --data-root {root.parent}"
    raise Missing(f"no images in {folder / 'train' / 'good'}; {hint}")


def train_files(folder: Path) -> list[Path]:
    """A category's normal images: in train/good and its sub-folders, else in the folder itself."""
    good = folder / "train" / "good"
    return image_files(good) if good.is_dir() else image_files(folder, deep=False)


def categories_in(root: Path) -> list[str]:
    """The sub-folders with a train/good; else those with images, if the root has none itself."""
    names = [path.parent.parent.name for path in root.glob("[!.]*/train/good")]
    if not names and not train_files(root):
        others = (path for path in root.glob("[!.]*") if path.name not in THUMBNAILS)
        names = [path.name for path in others if train_files(path)]
    return sorted(names)


def categories_of(config: Config, data_root: Path | None) -> list[str | None]:
    """All categories of a data set; [None] where the root is a category itself."""
    if config.dataset in CLASSES:
        return list(CLASSES[config.dataset])
    return categories_in(data_root_of(config.dataset, data_root)) or [None]


def missing(
    config: Config, names: list[str | None], data_root: Path | None, download: bool, skip=False
) -> dict[str, str]:
    """The categories whose images are not there: name -> reason.

    UserError where there are any; with `skip` only where there are no others.
    """
    reasons = {}
    for name in names:
        one = config.replace(category=name)
        try:
            if category_folder(one, data_root) is None:
                arrays(config.dataset, data_root, download)
        except Missing as error:
            reasons[name] = str(error)
    others = {*names} - reasons.keys()
    if reasons and not (skip and others):
        hint = "; --categories, or --skip-missing in a benchmark, leaves them out" if others else ""
        raise UserError(
            f"data of {len(reasons)} of {len(names)} categories is missing "
            f"({', '.join(name or 'any' for name in reasons)}), nothing was trained{hint}. "
            f"The first: {next(iter(reasons.values()))}"
        )
    return reasons


def image_hashes(config: Config, data_root: Path | None) -> dict[str, str]:
    """Hashes of train_images and of test_images with the masks. Empty where there are no files."""
    folder = category_folder(config, data_root)
    if folder is None:
        return {}
    test = test_files(folder)
    masks = [mask for masks in mask_files(folder, test) for mask in masks]
    return {
        "train_images": content_hash(train_files(folder), folder),
        "test_images": content_hash([path for path, _ in test] + masks, folder),
    }


def content_hash(paths: list[Path], folder: Path) -> str:
    """Hash of the files' bytes and of their names relative to the folder."""
    total = hashlib.sha256()
    for path in paths:
        name = os.fsencode(path.relative_to(folder))
        total.update(hashlib.sha256(name + b"\0" + path.read_bytes()).digest())
    return total.hexdigest()[:16]


def load_folder(config: Config, folder: Path, name: str) -> Category:
    train = train_files(folder)
    kept, held_out = split_calibration(len(train), config, folder)
    test = test_files(folder)
    if (folder / "test").is_dir() and len({defect == "good" for _, defect in test}) < 2:
        raise UserError(
            f"{folder / 'test'}: images are needed in test/good and in test/<defect>; found: "
            f"{', '.join(sorted({name for _, name in test})) or 'none'}; add some, or take test/ "
            "away to train and calibrate only"
        )
    # One tensor in the order of the parts, so that no part is a copy
    paths = [train[i] for i in torch.cat([kept, held_out])] + [path for path, _ in test]
    pixels, facts = read_images(paths, config.image_size, config.channels)
    kind = kind_of(facts[: len(train)])
    if kind.full_scale not in (0, FULL_SCALES[-1]):  # of a camera of fewer than 16 bits
        pixels, facts = read_images(paths, config.image_size, config.channels, kind.full_scale)
        kind = kind_of(facts[: len(train)])
    note_odd(paths, facts, kind)
    masks = mask_files(folder, test)
    note_left_out(folder, [*paths, *(mask for masks in masks for mask in masks)])
    category = Category(
        name,
        *pixels.split([len(kept), len(held_out), len(test)]),
        test_labels=np.array([int(defect != "good") for _, defect in test], dtype=np.int64),
        test_defects=[defect for _, defect in test],
        test_paths=[path.relative_to(folder).as_posix() for path, _ in test],
        test_masks=load_masks(folder, test, masks, facts[len(train) :], config.image_size),
        kind=kind,
    )
    note_repeated(category, pixels[: len(train)])
    return category


def note_repeated(category: Category, normal: Tensor) -> None:
    """Print how many images are copies of other training images, normal (n, C, S, S)."""
    known = set(fingerprints(normal))
    if len(known) < len(normal):
        counts = f"{len(normal) - len(known)} of {len(normal)} training images are copies"
        message = f"{counts} of others, so there will be more false alarms than expected"
        print(f"note: {category.name}: {message}", file=sys.stderr)
    test = zip(category.test_paths, fingerprints(category.test))
    again = [path for path, mark in test if mark in known]
    if again:
        counts = f"{len(again)} of {len(category.test)} test images are training images too"
        print(f"note: {category.name}: {counts}; the first: {again[0]}", file=sys.stderr)


def fingerprints(pixels: Tensor) -> list[str]:
    """A hash of every image of uint8 (N, C, S, S). Images with equal pixels have the same hash."""
    return [hashlib.blake2b(image, digest_size=8).hexdigest() for image in pixels.numpy()]


def test_files(folder: Path) -> list[tuple[Path, str]]:
    """The images in test/<defect> and its sub-folders, each with the defect's name; sorted."""
    root = folder / "test"
    inside = [(path, path.relative_to(root).parts) for path in image_files(root)]
    return [(path, kind) for path, (kind, *below) in inside if below]


# One class of a labelled set as the anomaly (the paper's MNIST and CIFAR-10 protocol)


@functools.lru_cache(maxsize=1)  # a benchmark asks for the same images for every class
def arrays(dataset: str, data_root: Path | None, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, h, w) or (N, h, w, 3) in uint8 and their classes (N,), train and test pooled."""
    if dataset == "digits":
        from sklearn.datasets import load_digits  # late, as it is slow to import

        if data_root is not None:
            hint = "for your images add --dataset folder or a --category"
            print(f"note: the digits need no --data-root; {hint}", file=sys.stderr)
        digits = load_digits()
        return np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target
    from torchvision import datasets  # late, as it is slow to import

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[dataset]
    root = data_root_of(dataset, data_root)
    try:
        with locked(root, wait=True) if download else contextlib.nullcontext():
            parts = [kind(root, train=train, download=download) for train in (True, False)]
    except (RuntimeError, ValueError, EOFError, AssertionError, URLError) as error:
        # Not there, damaged or offline
        hint = "" if download else f"; {flag('--download')} fetches it"
        raise Missing(f"no complete {dataset} in {root}{hint}{reason_of(error)}") from None
    return np.concatenate([p.data for p in parts]), np.concatenate([p.targets for p in parts])


def load_one_class_out(config: Config, images: np.ndarray, classes: np.ndarray) -> Category:
    """The category's class is the anomaly, all tested. The seed splits the other classes 80/20."""
    names = CLASSES[config.dataset]
    anomaly = names.index(config.category)
    normal = torch.from_numpy(np.flatnonzero(classes != anomaly))
    rng = torch.Generator().manual_seed(config.seed)
    shuffled = normal[torch.randperm(len(normal), generator=rng)]
    n_train = round(0.8 * len(normal))
    kept, held_out = split_calibration(n_train, config, config.dataset)
    train, test_good = shuffled[:n_train].sort().values, shuffled[n_train:].sort().values
    test = np.concatenate([test_good.numpy(), np.flatnonzero(classes == anomaly)])
    # One tensor in the order of the parts, so that no part is a copy
    order = [*train[kept].tolist(), *train[held_out].tolist(), *test]
    chosen = (Image.fromarray(images[i]) for i in order)
    read = [to_pixels(image, config.image_size, config.channels) for image in chosen]
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in read]))
    labels = (classes[test] == anomaly).astype(np.int64)
    return Category(
        config.category,
        *pixels.split([len(kept), len(held_out), len(test)]),
        test_labels=labels,
        test_defects=[names[anomaly] if label else "good" for label in labels],
        test_paths=[f"{names[classes[i]]}/{i:05d}" for i in test],
        kind=kind_of([facts for _, facts in read[:n_train]]),
    )


def split_calibration(n: int, config: Config, where) -> tuple[Tensor, Tensor]:
    """Sorted indices to train on and to calibrate with; UserError where n is too small."""
    held_out = max(MIN_CALIBRATION, round(config.calibration_fraction * n))
    if n - held_out < MIN_TRAIN:
        lower = " or lower --calibration-fraction" if held_out > MIN_CALIBRATION else ""
        raise UserError(
            f"{where}: {n} training images; calibration takes {held_out}, training needs "
            f"{MIN_TRAIN}: add images{lower}"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    return order[held_out:].sort().values, order[:held_out].sort().values
