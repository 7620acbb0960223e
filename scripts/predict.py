"""Score images with a trained model: CSV with path, score, threshold, verdict and p-value.

An image is called defective when its score is above the threshold, which held-out normal images
set; the p-value is the share of normal images that score as high. An image that cannot be read is
a row with the reason, and the exit code is 1. Rows are written as images are scored, into
FILE.part until all are there. After an interruption the same command goes on from there, unless
the model or an image has changed since.
"""

import contextlib
import csv
import errno
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from ganomaly import cli
from ganomaly.detector import Detector, load_detector
from ganomaly.device import use_device, use_threads
from ganomaly.errors import UserError, guard
from ganomaly.files import as_bytes, check_output, lock, path_in_error, write_atomic, write_output
from ganomaly.images import Facts, decode, note_odd, read_image
from ganomaly.paths import Item, find_images
from ganomaly.runs.pictures import SIDE, WORST, encoded, explained
from ganomaly.runs.results import csv_text, promise

MARK = ".heatmaps"  # a file in a folder of heat maps
HEADER = ["path", "score", "threshold", "verdict", "p_value"]
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # any file name fits


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser)
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE", help="[standard output]")
    add("--heatmaps", type=Path, metavar="DIR", help="new folder: image, reconstruction, heat map")
    add("--report", type=Path, metavar="FILE", help="an HTML page, the most anomalous first")
    args = parser.parse_args(argv)

    items = [item for text in args.images for item in find_images(text)]
    inputs = [args.model, *(path for path, _ in items)]
    key = key_of([args.heatmaps, args.quantile, args.score], inputs)  # before any of them is read
    detector = load_detector(args.model, use_device(args.device))
    use_threads(detector.config.threads)
    detector.set_quantile(args.quantile, args.score)
    if args.output:
        check_output(args.output, inputs)
    if args.report:
        check_output(args.report, inputs, "--report")
        if args.output and os.path.realpath(args.output) == os.path.realpath(args.report):
            raise UserError(f"--report {args.report}: is the --output too; name another file")
    if args.heatmaps:
        check_heatmaps(args.heatmaps, args.images, items)
        key += key_of([], [args.heatmaps / MARK])  # a new folder lacks the pictures of earlier rows

    seen: list[tuple[str, Facts]] = []
    rows = write_rows(args, items, key, detector, seen)
    counts = Counter(verdict.partition(":")[0] for _, _, _, verdict, _ in rows)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("normal", "defective", "unreadable"))
    note_odd([path for path, _ in seen], [facts for _, facts in seen], detector.kind)
    promised = promise(len(detector.normal), detector.config.quantile)
    text = f"{len(items)} images: {kinds}; {promised}"
    if args.report:
        from ganomaly.runs.report import verdicts_page  # late, as it is slow to import

        scored = (row for row in rows if row[1])
        worst = sorted(scored, key=lambda row: float(row[1]), reverse=True)[:WORST]
        write_output(args.report, verdicts_page(detector, worst, text))
    places = {"written to": args.output, "heat maps in": args.heatmaps, "page": args.report}
    written = [f"{what} {path}" for what, path in places.items() if path]
    print("; ".join([text, *written]), file=sys.stderr)
    return 1 if counts["unreadable"] else 0


def write_rows(args, items: list[Item], key: str, detector: Detector, seen: list) -> list[list]:
    """Score the images and write a row of each; those of an interrupted run come first."""
    output, part, rows = args.output, None, []
    if output is None:
        opened = contextlib.nullcontext(sys.stdout)
    elif output.exists() and not output.is_file():  # a pipe or a device
        opened = open(output, "w", **TEXT)
    else:
        output = Path(os.path.realpath(output))  # a link stays a link
        part = output.with_name(f"{output.name}.part")
        opened = open(part, "a+", **TEXT)
    with path_in_error(part or output or Path("standard output")), opened as file:
        writer = csv.writer(file, lineterminator="\n")
        if part:
            lock(file, f"{part}: another process is writing to this file")
            if file.tell():
                rows = rows_before(file, key, detector.batch)
                text = f"going on after {len(rows)} of {len(items)} images"
                print(f"{part}: {text}; the notes below are on the others", file=sys.stderr)
            # The kept rows stay in the file, so that another kill does not lose them
            file.truncate(len(as_bytes(csv_text([*HEADER, key], rows))) if rows else 0)
        if not rows:
            writer.writerow([*HEADER, key] if part else HEADER)
        try:
            for batch in judged(detector, items[len(rows) :], args.heatmaps, seen):
                rows += batch
                writer.writerows(batch)
                file.flush()
            if part:
                write_atomic(output, csv_text(HEADER, rows))
                part.unlink(missing_ok=True)
        except KeyboardInterrupt:
            if part is None:
                raise
            raise KeyboardInterrupt(f"{part} has the rows, the same command goes on") from None
    return rows


def key_of(words: list, paths: list[str | Path]) -> str:
    """A text that changes with the words, and when one of the files is changed or replaced."""
    states = [os.stat(path) if os.path.exists(path) else None for path in paths]
    versions = [state and (state.st_ino, state.st_ctime_ns) for state in states]
    return hashlib.sha256(repr([words, paths, versions]).encode()).hexdigest()


def rows_before(file: IO, key: str, batch: int) -> list:
    """The rows that an interrupted run of the same command has written.

    The last row may be cut. Only whole batches count, as the last digits of a score depend on the
    others of its batch.
    """
    file.seek(0)
    try:
        header, *rows = list(csv.reader(file))[:-1] or [[]]
    except csv.Error:
        return []
    return rows[: len(rows) - len(rows) % batch] if header == [*HEADER, key] else []


def check_heatmaps(folder: Path, places: list[str], items: list[Item]) -> None:
    """No heat map may take the place of another file, nor be scored as an image."""
    real = Path(os.path.realpath(folder))
    for place in map(os.path.realpath, filter(os.path.isdir, places)):
        if real.is_relative_to(place):
            raise UserError(f"--heatmaps {folder}: is in a folder of images; name another folder")
    paths: dict[Path, str] = {}
    for path, name in items:
        target = heatmap_of(folder, name)
        if Path(os.path.realpath(path)).is_relative_to(real):
            raise UserError(f"--heatmaps {folder}: holds images to score; name another folder")
        if paths.setdefault(target, path) != path:
            both = f"{paths[target]} and {path} would both be {target}"
            raise UserError(f"--heatmaps: {both}; score them apart")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        if any(folder.iterdir()):
            raise UserError(f"--heatmaps {folder}: holds other files; name a new folder")
        (folder / MARK).touch()


def heatmap_of(folder: Path, name: str) -> Path:
    return folder / (name if name.endswith(".png") else name + ".png")


def judged(
    detector: Detector, items: list[Item], heatmaps: Path | None, seen: list
) -> Iterator[list]:
    """Yield the rows of each batch of items; add path and facts of those that were read to seen."""
    config, white = detector.config, detector.kind.full_scale
    threshold = f"{detector.threshold:.9g}"
    results = decode([path for path, _ in items], config.image_size, config.channels, white)
    starts = range(0, len(items), detector.batch)
    for start in tqdm(starts, "scoring", unit="batch", leave=False, disable=None):
        batch = list(zip(items[start : start + detector.batch], results))
        readable = [read[0] for _, read in batch if not isinstance(read, str)]
        if readable:
            images = torch.from_numpy(np.stack(readable))
            found, *maps = detector.explain(images) if heatmaps else (detector(images),)
            answers = zip(*(values.tolist() for values in found), *maps)
        rows = []
        for (path, name), read in batch:
            if isinstance(read, str):
                rows.append([path, "", threshold, f"unreadable: {read}", ""])
                continue
            score, p_value, defective, *parts = next(answers)
            verdict = "defective" if defective else "normal"
            rows.append([path, f"{score:.9g}", threshold, verdict, f"{p_value:.4g}"])
            facts = read[1]
            if heatmaps:
                large = read_image(path, SIDE, config.channels, white)
                if not isinstance(large, str):  # it was there a moment ago
                    caption = f"{verdict}: score {score:.4g}, threshold {detector.threshold:.4g}"
                    image = torch.from_numpy(large[0])
                    try:
                        picture = encoded(explained(image, *parts, defective, caption))
                        write_atomic(heatmap_of(heatmaps, name), picture)
                    except OSError as error:
                        if error.errno != errno.ENAMETOOLONG:
                            raise
                        note = "have a name that is too long for a heat map"
                        facts = facts._replace(notes=(*facts.notes, note))
            seen.append((path, facts))
        yield rows


if __name__ == "__main__":
    sys.exit(guard(main))
