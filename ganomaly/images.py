"""Image files of any kind -> square uint8 pixels, decoded by threads."""

import contextlib
import math
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ganomaly.errors import UserError

# Formats that are read, whatever a file's suffix. One of Pillow's other readers starts Ghostscript
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "JPEG2000", "PPM")
FULL_SCALES = (255, 1023, 4095, 16_383, 65_535)  # of 8, 10, 12, 14 and 16 bits
GREY, COLOURED = 4, 16  # mean levels between channels: grey images have fewer, colour images more
ALIKE = 1.05  # factor between two ratios of width to height that count as the same
AHEAD = 256  # images decoded in advance

# Pillow warns of large images and of unusual camera tags. Neither is a problem
warnings.filterwarnings("ignore", module=r"PIL\.")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long notes in a file are harmless


class Facts(NamedTuple):
    """What is known of an image file beside its pixels."""

    aspect: float  # width / height, upright
    colour: float  # mean difference between channels, in levels
    brightest: int  # the largest level of a 16-bit file, else 0
    notes: tuple[str, ...]


class Kind(NamedTuple):
    """What the training images have in common. A model keeps it, to read new images alike."""

    full_scale: int = 0  # level that stands for white in 16-bit files; 0: there was no such file
    aspect: tuple[float, float] = (0.0, math.inf)  # smallest and largest width / height
    colour: tuple[float, float] = (0.0, math.inf)  # smallest and largest, see Facts


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A file as a Pillow image. Of a path, Pillow would map a turned TIFF in another shape."""
    with open(path, "rb") as file:
        try:
            Image.open(file, formats=FORMATS).verify()
        except UnidentifiedImageError:
            raise ValueError("no image of a format that is read") from None
        except Exception as error:
            if "IDAT" in str(error):  # the checksum of a PNG's pixels, which reading ignores
                raise
        with Image.open(file, formats=FORMATS) as image:
            yield image


def levels_of(image: Image.Image) -> np.ndarray | None:
    """The levels of a 16-bit image, (h, w) or (h, w, C); None for an image of 8 bits."""
    if image.mode[0] in "IF":  # grey
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # Pillow does not turn it round
            raise ValueError("a 16-bit TIFF whose white is 0 is not read; save as PNG")
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65_535:
            raise ValueError("32-bit pixels have no known range; save as 8 or 16 bits")
        return levels.astype(np.int32)
    if ";16" not in str(getattr(image, "tile", "")):
        if image.format == "TIFF" and 16 in (image.tag_v2.get(258) or ()):
            raise ValueError("a 16-bit TIFF of separate planes is not read; save as PNG")
        return None
    file = image.fp  # None after the next line
    high = np.asarray(image)[..., :3].astype(np.int32)  # Pillow keeps one byte; no alpha channel
    try:
        with Image.open(file, formats=FORMATS) as other:
            other.tile = [(*tile[:3], swapped(tile[3])) for tile in other.tile]
            return 256 * high + np.asarray(other)[..., :3]
    except Exception:  # grey with alpha, or a compressed TIFF
        if high.max() < 64:  # of a camera of 10 to 13 bits
            message = "only 8 of its 16 bits can be read, too few for this camera; save as PNG"
            raise ValueError(f"{message} without alpha") from None
        return 257 * high


def swapped(arguments: str | tuple) -> str | tuple:
    """The arguments of a Pillow decoder of 16-bit colour, with the bytes of a level swapped."""
    if isinstance(arguments, tuple):
        return (swapped(arguments[0]), *arguments[1:])
    return arguments[:-1] + ("L" if arguments[-1] == "B" else "B")  # N, the machine's own, is L


def to_pixels(
    image: Image.Image, image_size: int, channels: int, full_scale: int = 0
) -> tuple[np.ndarray, Facts]:
    """Any Pillow image -> uint8 (C, S, S): upright, 8 bits, squashed to a square."""
    notes, brightest = [], 0
    if image.format in ("TIFF", "GIF", "WEBP", "PNG") and getattr(image, "is_animated", False):
        notes.append("have several pages, of which the first is read")
    levels = levels_of(image)
    image.load()
    if levels is None and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when such a palette goes straight to RGB
    if image.getbands()[-1] == "A" and image.getchannel("A").getextrema()[0] < 255:
        notes.append("have transparent pixels; the colours under them count, though hidden")
    original = image
    if levels is not None:
        brightest, white = int(levels.max()), full_scale or FULL_SCALES[-1]
        eight_bits = ((levels * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(eight_bits)
    try:
        turn = ExifTags.Base.Orientation
        image.getexif()[turn] = original.getexif().get(turn, 1)
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata raise errors of any kind
        notes.append("have damaged metadata and may lie on their side")
    few = image.resize((64, 64), Image.Resampling.NEAREST).convert("RGB")
    few = np.asarray(few.resize((8, 8), Image.Resampling.BOX)).astype(int)  # without noise
    colour = float(np.ptp(few, axis=2).mean())
    facts = Facts(image.width / image.height, colour, brightest, tuple(notes))
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.array(image.resize((image_size, image_size), Image.Resampling.BILINEAR))
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1)), facts


def read_image(
    path: str | Path, image_size: int, channels: int, full_scale: int = 0
) -> tuple[np.ndarray, Facts] | str:
    """to_pixels of a file, or the reason why it cannot be read."""
    try:
        if Path(path).is_fifo():  # opening it would wait for a writer
            return "a pipe, not a file"
        with opened(path) as image:
            return to_pixels(image, image_size, channels, full_scale)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise errors of any kind
        return getattr(error, "strerror", None) or str(error) or type(error).__name__


def decode(paths: Sequence[str | Path], image_size: int, channels: int, full_scale: int = 0):
    """Yield read_image of every path, in order; threads decode up to AHEAD images in advance."""
    read = partial(read_image, image_size=image_size, channels=channels, full_scale=full_scale)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), AHEAD):
            yield from pool.map(read, paths[start : start + AHEAD])


def read_images(
    paths: Sequence[Path], image_size: int, channels: int, full_scale: int = 0
) -> tuple[Tensor, list[Facts]]:
    """uint8 (N, C, S, S) and the facts of each; a UserError lists the files that cannot be read."""
    pixels = torch.empty((len(paths), channels, image_size, image_size), dtype=torch.uint8)
    results = decode(paths, image_size, channels, full_scale)
    facts, bad = [], []
    for i, result in enumerate(tqdm(results, "decoding", len(paths), leave=False, disable=None)):
        if isinstance(result, str):
            bad.append(f"{paths[i]} ({result})")
        else:
            pixels[i] = torch.from_numpy(result[0])
            facts.append(result[1])
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be read, mend or remove: {', '.join(bad)}"
        )
    return pixels, facts


def kind_of(facts: Sequence[Facts]) -> Kind:
    """Images of one set share one full scale, the smallest of FULL_SCALES that holds their levels.

    Cameras of 10 or 12 bits write 16-bit files too.
    """
    aspects, colours = [one.aspect for one in facts], [one.colour for one in facts]
    most = max(one.brightest for one in facts)
    full_scale = next(scale for scale in (0, *FULL_SCALES) if most <= scale)
    return Kind(full_scale, (min(aspects), max(aspects)), (min(colours), max(colours)))


def note_odd(paths: Sequence[str | Path], facts: Sequence[Facts], kind: Kind) -> None:
    """Print what is odd about images, and where they differ from the training images."""
    found: dict[str, list[str | Path]] = defaultdict(list)  # note -> images
    for path, one in zip(paths, facts):
        notes = list(one.notes)
        if one.brightest and not kind.full_scale:
            notes.append("have 16 bits, the training images have 8; 65535 is taken as white")
        elif one.brightest > kind.full_scale:
            notes.append(f"are brighter than {kind.full_scale}, which is white since training")
        low, high = kind.colour
        if one.colour > COLOURED + 2 * high and high <= COLOURED:
            notes.append("are in colour, the training images are grey")
        elif one.colour <= GREY and low > COLOURED:
            notes.append("are grey, the training images are in colour")
        low, high = kind.aspect
        if not low / ALIKE <= one.aspect <= high * ALIKE:
            shapes = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
            notes.append(f"have another width / height than the training images ({shapes})")
        for note in notes:
            found[note].append(path)
    for note, odd in found.items():
        counts = f"{len(odd)} of {len(facts)}"
        print(f"note: {counts} images {note}; the first: {odd[0]}", file=sys.stderr)
