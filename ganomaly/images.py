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
from PIL import (
    Image,
    ImageOps,
    TiffImagePlugin,  # noqa: F401, makes a format known
    WebPImagePlugin,  # noqa: F401
)
from torch import Tensor
from tqdm import tqdm

from ganomaly.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
# What a file may be, whatever its name; other readers of Pillow's are rare, one starts Ghostscript
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF")
NOT_READ = set(".gif .heic .heif .avif .jp2 .jxl .raw .cr2 .nef .arw .dng".split())
AHEAD = 256  # images decoded before they are asked for

# Of large images and of odd camera tags Pillow warns; neither is news to who took them.
warnings.filterwarnings("ignore", module=r"PIL\.")


def suffix_of(path) -> str:
    return os.path.splitext(path)[1].lower()


def image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if suffix_of(p) in SUFFIXES and p.name[0] != ".")


def note_others(folder: Path, paths) -> None:
    """Say which files of a folder are not read for their suffix: .heic photographs, for one."""
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
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_image(path: str | Path, image_size: int, channels: int) -> np.ndarray | str:
    """uint8 (C, S, S), or the reason why the file cannot be read."""
    path = Path(path)
    try:
        if path.is_fifo():  # it would be waited for
            return "a pipe, not a file"
        with Image.open(path, formats=FORMATS) as image:
            return to_pixels(image, image_size, channels)
    except Image.UnidentifiedImageError:
        return "empty file" if path.stat().st_size == 0 else "not an image"
    except MemoryError:
        raise
    except Exception as error:  # whatever a reader makes of damaged bytes
        return getattr(error, "strerror", None) or str(error) or type(error).__name__


def decode(paths: Iterable[str | Path], image_size: int, channels: int):
    """Yield read_image of every path, in order, decoded by threads a little ahead of the reader."""
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


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without them
        return free
    # Limits of a container or a batch job: its own, and those of the groups around it
    for line in groups:
        _, controllers, inside = line.split(":", 2)
        names, top = ("max", "current"), root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):  # version 1
            names, top = ("limit_in_bytes", "usage_in_bytes"), top / "memory"
        elif controllers:
            continue
        place = top / inside.lstrip("/")
        for group in (place, *(p for p in place.parents if p.is_relative_to(top))):
            try:
                limit, used = (int((group / f"memory.{name}").read_text()) for name in names)
                stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no limit there
                continue
            # Cached files are counted as used, and go where memory is asked for
            cached = sum(int(stat.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
            free = max(0, min(free, limit - used + cached))
    return free


def check_memory(n: int, image_size: int, channels: int) -> None:
    """UserError where n decoded images do not fit into memory, before an hour of decoding."""
    needed, free = n * channels * image_size**2, free_memory()
    if free is None or needed <= free:
        return
    mends = [f"{free // (needed // n)} of them fit"]
    for size in (s for s in (512, 256, 128, 64, 32) if s < image_size):
        if (smaller := n * channels * size**2) <= free:
            mends.append(f"--image-size {size} takes {smaller / 1e9:.1f}")
            break
    if channels > 1:
        mends.append("--channels 1 a third")
    raise UserError(
        f"{n} images of {channels} x {image_size} x {image_size} take {needed / 1e9:.1f} GB of "
        f"memory, {free / 1e9:.1f} GB are free; {', '.join(mends)}"
    )


def read_images(paths: list[Path], image_size: int, channels: int) -> Tensor:
    """uint8 (N, C, S, S); a UserError lists every file that cannot be read."""
    check_memory(len(paths), image_size, channels)
    pixels = torch.empty((len(paths), channels, image_size, image_size), dtype=torch.uint8)
    bad = []
    results = decode(paths, image_size, channels)
    for i, result in enumerate(
        tqdm(results, "decoding", len(paths), unit="image", leave=False, disable=None)
    ):
        if isinstance(result, str):
            bad.append(f"{paths[i]} ({result})")
        else:
            pixels[i] = torch.from_numpy(result)
    if bad:
        count = "1 image" if len(bad) == 1 else f"{len(bad)} images"
        raise UserError(f"{count} cannot be read, mend or remove: {', '.join(bad)}")
    return pixels
