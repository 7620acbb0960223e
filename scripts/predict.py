"""Score images with a trained model: CSV with path, score, threshold, verdict and p-value.

An image is called defective when its score is above the threshold, which held-out normal images
set at training; the p-value is the share of normal images that score as high. An image that cannot
be read is a row with the reason, and the exit code is 1.
"""

import csv
import glob
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ganomaly import cli
from ganomaly.detector import Detector, load_detector
from ganomaly.device import use_device, use_threads
from ganomaly.errors import UserError, guard
from ganomaly.files import check_output, write_atomic, write_output
from ganomaly.images import SUFFIXES, decode, note_others, read_image, suffix_of
from ganomaly.runs.pictures import SIDE, explained, png

# A path, and the name of its heat map: relative to the folder that was asked for. Both are text:
# Path objects of 100,000 images would use most of the memory
Item = tuple[str, str]


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="PATH",
        help="images, folders, patterns such as '**/*.png'; - reads paths from a pipe",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="[standard output]")
    parser.add_argument(
        "--heatmaps", type=Path, metavar="DIR", help="image, reconstruction and heat map of each"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    args = parser.parse_args(argv)

    detector = load_detector(args.model, use_device(args.device))
    use_threads(detector.config.threads)
    above = detector.set_quantile(args.quantile or detector.config.quantile)
    items = [item for text in args.images for item in find_images(text)]
    if args.output:
        check_output(args.output, [args.model, *(path for path, _ in items)])
    if args.heatmaps:
        check_heatmaps(args.heatmaps, items)

    text = io.StringIO() if args.output else sys.stdout
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "score", "threshold", "verdict", "p_value"])
    threshold = f"{detector.threshold:.9g}"
    counts = {"normal": 0, "defective": 0, "unreadable": 0}
    for path, score, verdict, p_value in judged(detector, items, args.heatmaps):
        counts[verdict.partition(":")[0]] += 1
        writer.writerow([path, score, threshold, verdict, p_value])
    if args.output:
        write_output(args.output, text.getvalue())
    print(
        f"{len(items)} images: {', '.join(f'{n} {kind}' for kind, n in counts.items())}; of normal "
        f"images {above:.1%} are expected above the threshold, by {len(detector.normal)} held out"
        + (f"; written to {args.output}" if args.output else "")
        + (f"; heat maps in {args.heatmaps}" if args.heatmaps else ""),
        file=sys.stderr,
    )
    return 1 if counts["unreadable"] else 0


def find_images(text: str) -> list[Item]:
    """An image as given; the images in a folder and its sub-folders, or of a pattern, sorted."""
    path = Path(text)
    if text == "-":
        given = os.fsdecode(sys.stdin.buffer.read())
        if "\0" in given:
            raise UserError("--images -: takes a path a line, as find prints them without -print0")
        lines = [line.removesuffix("\r") for line in given.split("\n")]
        if not any(lines):
            raise UserError("--images -: no paths came through the pipe")
        return [one_item(Path(line)) for line in lines if line]
    if path.is_dir():
        inside: list[str] = []
        closed: list[str] = []  # folders that cannot be read: a row each, as images are
        for place, folders, names in os.walk(path, onerror=lambda e: closed.append(e.filename)):
            folders[:] = [name for name in folders if name[0] != "."]
            inside += [os.path.join(place, name) for name in names if name[0] != "."]
        note_others(path, inside)
        inside = [p for p in inside if suffix_of(p) in SUFFIXES and os.path.isfile(p)] + closed
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


def check_heatmaps(folder: Path, items: list[Item]) -> None:
    """No heat map may take the place of an image or of another heat map, nor be scored as one."""
    paths: dict[Path, str] = {}
    for path, name in items:
        target = heatmap_of(folder, name)
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise UserError(f"--heatmaps {folder}: holds images to score; name another folder")
        if target.exists() and not is_heatmap(target):
            raise UserError(f"--heatmaps: {target} is there and none of ours; name another folder")
        if paths.setdefault(target, path) != path:
            both = f"{paths[target]} and {path} would both be {target}"
            raise UserError(f"--heatmaps: {both}; score them apart")
    folder.mkdir(parents=True, exist_ok=True)


def is_heatmap(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.size == (3 * SIDE, SIDE)
    except Exception:  # damaged, or anything else
        return False


def heatmap_of(folder: Path, name: str) -> Path:
    return folder / (name if name.endswith(".png") else name + ".png")


def judged(detector: Detector, items: list[Item], heatmaps: Path | None) -> Iterator[tuple]:
    """Yield path, score, verdict and p-value of every item, as text."""
    config = detector.config
    results = decode((path for path, _ in items), config.image_size, config.channels)
    starts = range(0, len(items), detector.batch)
    for start in tqdm(starts, "scoring", unit="batch", leave=False, disable=None):
        batch = list(zip(items[start : start + detector.batch], results))
        readable = [(item, pixels) for item, pixels in batch if not isinstance(pixels, str)]
        if readable:
            images = torch.from_numpy(np.stack([pixels for _, pixels in readable]))
            verdicts = zip(*(values.tolist() for values in detector(images)))
            if heatmaps:
                maps, x_hats = detector.heat_maps(images), detector.reconstructions(images)
                for ((path, name), _), x_hat, heat in zip(readable, x_hats, maps):
                    large = read_image(path, SIDE, config.channels)
                    if not isinstance(large, str):  # it was there a moment ago
                        picture = explained(torch.from_numpy(large), x_hat, heat)
                        write_atomic(heatmap_of(heatmaps, name), png(picture))
        for (path, _), pixels in batch:
            if isinstance(pixels, str):
                yield path, "", f"unreadable: {pixels}", ""
            else:
                score, p_value, defective = next(verdicts)
                verdict = "defective" if defective else "normal"
                yield path, f"{score:.9g}", verdict, f"{p_value:.4g}"


if __name__ == "__main__":
    sys.exit(guard(main))
