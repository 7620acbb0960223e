"""Image files of any kind -> square uint8 pixels, decoded by threads."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ganomaly.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
# Formats that are read, whatever a file's suffix. One of Pillow's other readers starts Ghostscript
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF")
NOT_READ = set(".gif .heic .heif .avif .jp2 .jxl .raw .cr2 .nef .arw .dng".split())
AHEAD = 256  # images decoded in advance

# Pillow warns of large images and of unusual camera tags. Neither is a problem
warnings.filterwarnings("ignore", module=r"PIL\.")


def suffix_of(path) -> str:
    return os.path.splitext(path)[1].lower()


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder; no hidden ones, and no pipes, which have no end to read to."""
    named = (p for p in folder.iterdir() if suffix_of(p) in SUFFIXES and p.name[0] != ".")
    return sorted(p for p in named if not p.is_fifo())


def note_others(folder: Path, paths) -> None:
    """Print how many image files are not read because of their suffix, such as .heic."""
    found = Counter(suffix for path in paths if (suffix := suffix_of(path)) in NOT_READ)
    if found:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in sorted(found.items()))
        print(f"note: not read in {folder}: {kinds}; convert them to png", file=sys.stderr)


def to_pixels(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Any Pillow image -> uint8 (C, S, S): upright, 8 bits, squashed to a square."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save as 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65_535:
            raise ValueError("32-bit pixels have no known range; save as 8 or 16 bits")
        image = Image.fromarray(((levels * 255 + 32_767) // 65_535).astype(np.uint8))
    if "transparency" in image.info:  # Pillow warns when such a palette goes straight to RGB
        image = image.convert("RGBA")
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.array(image.resize((image_size, image_size), Image.Resampling.BILINEAR))
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_image(path: str | Path, image_size: int, channels: int) -> np.ndarray | str:
    """uint8 (C, S, S), or the reason why the file cannot be read."""
    try:
        if Path(path).is_fifo():  # opening it would wait for a writer
            return "a pipe, not a file"
        with Image.open(path, formats=FORMATS) as image:
            return to_pixels(image, image_size, channels)
    except Image.UnidentifiedImageError:
        return "not an image"
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise errors of any kind
        return getattr(error, "strerror", None) or str(error) or type(error).__name__


def decode(paths: Iterable[str | Path], image_size: int, channels: int):
    """Yield read_image of every path, in order; threads decode up to AHEAD images in advance."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque = deque()
        try:
            for path in paths:
                waiting.append(pool.submit(read_image, path, image_size, channels))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_images(paths: list[Path], image_size: int, channels: int) -> Tensor:
    """uint8 (N, C, S, S); a UserError lists every file that cannot be read."""
    pixels = torch.empty((len(paths), channels, image_size, image_size), dtype=torch.uint8)
    results = decode(paths, image_size, channels)
    bad = []
    for i, result in enumerate(tqdm(results, "decoding", len(paths), leave=False, disable=None)):
        if isinstance(result, str):
            bad.append(f"{paths[i]} ({result})")
        else:
            pixels[i] = torch.from_numpy(result)
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be read, mend or remove: {', '.join(bad)}"
        )
    return pixels
