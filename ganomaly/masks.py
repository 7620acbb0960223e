"""Masks of the defective pixels, drawn by people: which file is an image's, and what it says."""

import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ganomaly.images import ALIKE, Facts, opened
from ganomaly.paths import image_files

MASK_FOLDERS = ("ground_truth", "masks")
MASK_ENDING = re.compile(r"[-_ ]?(mask|gt|label|annotation)s?$")
FEW_LEVELS = 16  # a mask with more levels has soft edges
Tests = list[tuple[Path, str]]  # test images, each with its defect's name


def mask_files(folder: Path, test: Tests) -> list[list[Path]]:
    """The mask files of every test image; none for good images.

    The mask of test/<defect>/1.jpg is ground_truth/<defect>/1_mask.png, else 1.png there, else all
    files in a folder 1, as MVTec LOCO has. Any suffix is taken. `masks` is another name for
    ground_truth.
    """
    marked, named, inside = (defaultdict(list) for _ in range(3))
    for root in MASK_FOLDERS:
        for path in image_files(folder / root):
            name = path.relative_to(folder / root).with_suffix("").as_posix().casefold()
            short = MASK_ENDING.sub("", name)
            if short != name:
                marked[short].append(path)
            named[name].append(path)
            inside[os.path.dirname(name)].append(path)
    result: list[list[Path]] = []
    for path, defect in test:
        key = path.relative_to(folder / "test").with_suffix("").as_posix().casefold()
        masks = marked.get(key) or named.get(key) or inside.get(key) or []
        result.append([] if defect == "good" else masks)
    return result


def load_masks(
    folder: Path, test: Tests, masks: list[list[Path]], facts: list[Facts], image_size: int
) -> Tensor | None:
    """The masks as bool (N, S, S). None unless every defective image has one that can be right.

    A pixel is defective where at least half of its area is. Good images have no defective pixel.
    """
    defective = [i for i, (_, defect) in enumerate(test) if defect != "good"]
    folders = [name for name in MASK_FOLDERS if (folder / name).is_dir()]
    if not defective or not folders:
        return None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = list(pool.map(lambda i: load_mask(masks[i], facts[i].aspect, image_size), defective))
    wrong = [(reason, test[i][0]) for i, reason in zip(defective, read) if isinstance(reason, str)]
    if wrong:
        reason, first = wrong[0]
        counts = f"{len(wrong)} of {len(defective)} defective images have no usable mask in "
        message = f"{counts}{'/, '.join(folders)}/, so pixel AUROC and AUPRO are left out"
        print(f"note: {folder}: {message}; the first: {first} ({reason})", file=sys.stderr)
        return None
    result = torch.zeros(len(test), image_size, image_size, dtype=torch.bool)
    result[defective] = torch.from_numpy(np.stack(read))
    for words, chosen in (
        ("more than half of the image; are they inverted?", lambda mask: mask.mean() > 0.5),
        (f"nothing at {image_size} px, as the defects are too thin", lambda mask: not mask.any()),
    ):
        if n := sum(map(chosen, read)):
            print(f"note: {folder}: {n} of {len(read)} masks mark {words}", file=sys.stderr)
    return result


def load_mask(paths: list[Path], aspect: float, image_size: int) -> np.ndarray | str:
    """bool (S, S), defective where one of the files is; or why there is no such mask."""
    if not paths:
        return "no file with its name"
    whole = np.zeros((image_size, image_size), bool)
    for path in paths:
        try:
            with opened(path) as image:
                noisy = image.format in ("JPEG", "WEBP", "JPEG2000")
                pixels = mask_pixels(ImageOps.exif_transpose(image), noisy)
        except Exception as error:  # damaged files raise errors of any kind
            return f"{path.name}: {error}"
        height, width = pixels.shape
        if not 1 / ALIKE <= width / height / aspect <= ALIKE:
            return f"{path.name} has {width}x{height} pixels, another shape than the image"
        if not pixels.any():
            return f"{path.name} is empty"
        image = Image.fromarray(pixels.astype(np.uint8) * 255)
        whole |= np.asarray(image.resize((image_size,) * 2, Image.Resampling.BILINEAR)) >= 128
    return whole


def mask_pixels(image: Image.Image, noisy: bool) -> np.ndarray:
    """bool (h, w), True where defective.

    In a mask of few or low levels it is what is not 0, so 1 and 255 both mean defective. Else, and
    in a noisy format (as JPEG, which changes levels a little), it is what is above half of the
    maximum. If only the alpha channel varies, this channel is the mask.
    """
    levels = np.asarray(image if image.mode[0] in "IF" else image.convert("RGBA"))
    if levels.ndim == 3:
        levels, alpha = levels[..., :3].max(2), levels[..., 3]
        levels = levels if np.ptp(levels) or not np.ptp(alpha) else alpha
    few = len(np.unique(levels)) <= FEW_LEVELS or levels.max() < 128  # numbers of defects
    return levels > 0 if few and not noisy else levels > levels.max() / 2
