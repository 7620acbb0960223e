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
NOT_READ = set(".heic .heif .avif .jxl .raw .cr2 .cr3 .nef .arw .dng .psd .svg .exr .tga".split())
THUMBNAILS = {"@eaDir", "__MACOSX"}  # folders that a NAS or an archive program adds


def walk(folder: Path, deep: bool = True) -> list[str]:
    """The files in a folder and its sub-folders, sorted; no hidden ones and no thumbnails.

    Links are followed; a folder that is reached twice is read once. A folder that cannot be read
    stands among the files.
    """
    found: list[str] = []
    seen = set()
    places = os.walk(folder, onerror=lambda error: found.append(error.filename), followlinks=True)
    for place, folders, names in places:
        kept = [name for name in sorted(folders) if name[0] != "." and name not in THUMBNAILS]
        real = os.path.realpath(place)
        folders[:] = kept if deep and real not in seen else []
        if real not in seen:
            found += [os.path.join(place, name) for name in names if name[0] != "."]
        seen.add(real)
    return sorted(found, key=lambda path: path.split(os.sep))


def is_image(path: str) -> bool:
    """By the suffix. No pipes, which have no end to read to; a file that cannot be seen is one."""
    known = Path(path).suffix.lower() in SUFFIXES
    return known and (os.path.isfile(path) or not os.path.exists(path))


def image_files(folder: Path, deep: bool = True) -> list[Path]:
    """The image files in a folder, and in its sub-folders if `deep`; sorted."""
    return [Path(path) for path in walk(folder, deep) if is_image(path)]


def note_left_out(folder: Path, used: Iterable[str | Path]) -> None:
    """Print how many image files in a folder are not used, and where they are."""
    used = {str(path) for path in used}
    reasons: Counter[str] = Counter()
    for path in walk(folder):
        suffix = Path(path).suffix.lower()
        if suffix in NOT_READ:
            reasons[f"{suffix} (convert them to png)"] += 1
        elif path not in used and os.path.isdir(path):
            reasons[f"folder {os.path.relpath(path, folder)} that cannot be read"] += 1
        elif path not in used and is_image(path):
            reasons[f"in {os.path.relpath(os.path.dirname(path), folder)}"] += 1
    if reasons:
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common(5))
        print(f"note: {reasons.total()} left out of {folder}: {counts}", file=sys.stderr)


# A path, and a name for what is made of it: relative to the folder that was asked for. Both are
# text: Path objects of 100,000 images would use most of the memory
Item = tuple[str, str]


def find_images(text: str) -> list[Item]:
    """An image as given; the images in a folder and its sub-folders, or of a pattern, sorted.

    "-" reads a path a line from standard input. A folder that cannot be read is an item, whose row
    says so. UserError where there is nothing.
    """
    path = Path(text)
    if text == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline=None)
        given = sys.stdin.read()
        if "\0" in given:  # UTF-16 has them too
            raise UserError("--images -: takes UTF-8, a path a line, as of find without -print0")
        found = [one_item(line) for line in given.split("\n") if line]
    elif text and path.is_dir():
        inside = [p for p in walk(path) if is_image(p) or os.path.isdir(p)]
        note_left_out(path, inside)
        found = [(p, os.path.relpath(p, path)) for p in inside]
    else:
        matches = [match for match in sorted(glob.glob(text, recursive=True)) if is_image(match)]
        found = [one_item(match) for match in ([text] if path.is_file() else matches)]
    if not found:
        raise UserError(f"--images '{text}': there is no image ({', '.join(sorted(SUFFIXES))})")
    return found


def one_item(text: str) -> Item:
    """One image by its own path, whether it exists or not: its row says what is wrong."""
    path = Path(text)
    inside = not path.is_absolute() and ".." not in path.parts
    return str(path), str(path) if inside else path.name
