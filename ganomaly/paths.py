"""Which files are images: in a folder, of a pattern, in a list."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ganomaly.errors import UserError

SUFFIXES = set(
    ".png .jpg .jpeg .jpe .jfif .bmp .dib .tif .tiff .webp .gif .jp2 .pgm .ppm .pbm .pnm".split()
)
NOT_READ = set(".heic .heif .avif .jxl .raw .cr2 .cr3 .nef .arw .dng .psd .svg .exr".split())
THUMBNAILS = {"@eaDir", "__MACOSX"}  # folders that a NAS or an archive program adds


def suffix_of(path) -> str:
    return os.path.splitext(path)[1].lower()


def walk(folder: Path, deep: bool = True, closed: list[str] | None = None) -> list[str]:
    """The files in a folder and its sub-folders, sorted; no hidden ones and no thumbnails.

    Links are followed; a folder that is reached twice is read once. `closed` takes the folders
    that cannot be read.
    """
    found: list[str] = []
    seen = set()
    refused = None if closed is None else lambda error: closed.append(error.filename)
    for place, folders, names in os.walk(folder, onerror=refused, followlinks=True):
        kept = [name for name in sorted(folders) if name[0] != "." and name not in THUMBNAILS]
        real = os.path.realpath(place)
        folders[:] = kept if deep and real not in seen else []
        if real not in seen:
            found += [os.path.join(place, name) for name in names if name[0] != "."]
        seen.add(real)
    return sorted(found, key=lambda path: path.split(os.sep))


def is_image(path: str) -> bool:
    """By the suffix. No pipes, which have no end to read to."""
    return suffix_of(path) in SUFFIXES and not Path(path).is_fifo()


def image_files(folder: Path, deep: bool = True) -> list[Path]:
    """The image files in a folder, and in its sub-folders if `deep`; sorted."""
    return [Path(path) for path in walk(folder, deep) if is_image(path)]


def note_left_out(folder: Path, used: Iterable[str | Path]) -> None:
    """Print how many image files in a folder are not used, and where they are."""
    used = {str(path) for path in used}
    reasons: Counter[str] = Counter()
    for path in walk(folder):
        if suffix_of(path) in NOT_READ:
            reasons[f"{suffix_of(path)} (convert them to png)"] += 1
        elif path not in used and is_image(path):
            reasons[f"in {os.path.relpath(os.path.dirname(path), folder)}"] += 1
    if reasons:
        counts = [f"{n} {reason}" for reason, n in reasons.most_common(5)]
        counts += ["others"] * (len(reasons) > 5)
        print(f"note: images left out of {folder}: {', '.join(counts)}", file=sys.stderr)


# A path, and a name for what is made of it: relative to the folder that was asked for. Both are
# text: Path objects of 100,000 images would use most of the memory
Item = tuple[str, str]


def find_images(text: str) -> list[Item]:
    """An image as given; the images in a folder and its sub-folders, or of a pattern, sorted.

    "-" reads a path a line from standard input. UserError where there is nothing.
    """
    path = Path(text)
    if text == "-":
        given = sys.stdin.buffer.read()
        if given.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError("--images -: this list is UTF-16; save it as UTF-8")
        given = os.fsdecode(given.removeprefix(b"\xef\xbb\xbf"))
        if "\0" in given:
            raise UserError("--images -: takes a path a line, as find prints them without -print0")
        lines = [line.removesuffix("\r") for line in given.split("\n")]
        if not any(lines):
            raise UserError("--images -: no paths came through the pipe")
        return [one_item(Path(line)) for line in lines if line]
    if path.is_dir():
        closed: list[str] = []  # a row each, as images are
        inside = [p for p in walk(path, closed=closed) if is_image(p)] + closed
        note_left_out(path, inside)
        if not inside:
            raise UserError(f"{path}: no images ({', '.join(sorted(SUFFIXES))}) in this folder")
        inside.sort(key=lambda p: p.split(os.sep))
        return [(p, os.path.relpath(p, path)) for p in inside]
    if path.is_file():
        return [one_item(path)]
    if glob.has_magic(text):
        matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        if found := [p for p in matches if p.is_file() and suffix_of(p) in SUFFIXES]:
            return [one_item(p) for p in found]
        raise UserError(f"{text}: no image matches this pattern")
    raise UserError(f"{path}: no such image or folder")


def one_item(path: Path) -> Item:
    """One image by its own path, whether it exists or not: its row says what is wrong."""
    inside = not path.is_absolute() and ".." not in path.parts
    return str(path), str(path) if inside else path.name
