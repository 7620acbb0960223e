"""Score images with a trained model: CSV with path, score, threshold and verdict.

An image is called defective when its score is above the threshold, which held-out normal images
set at training. An image that cannot be read is a row with the reason, and the exit code is 1.
"""

import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser
from ganomaly.errors import UserError, guard, leaving_at_once


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="FILE", help="a run's model.pt"
    )
    parser.add_argument(
        "--images", type=Path, required=True, nargs="+", metavar="PATH", help="images or folders"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="[standard output]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    args = parser.parse_args(argv)

    with leaving_at_once():  # imported late: --help and a wrong flag don't wait for torch
        from ganomaly import pipeline, scoring

    detector = scoring.load_detector(args.model, pipeline.use_device(args.device))
    pipeline.use_threads(detector.config.threads)
    paths = find_images(args.images)
    check_output(args.output, [args.model, *paths])
    threshold = detector.threshold

    text = io.StringIO() if args.output else sys.stdout
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "score", "threshold", "verdict"])
    counts = {"normal": 0, "defective": 0, "unreadable": 0}
    for path, result in scored(detector, paths):
        if isinstance(result, str):
            counts["unreadable"] += 1
            writer.writerow([path, "", f"{threshold:.9g}", f"unreadable: {result}"])
        else:
            verdict = "defective" if result > threshold else "normal"
            counts[verdict] += 1
            writer.writerow([path, f"{result:.9g}", f"{threshold:.9g}", verdict])
    if args.output:
        write_output(args.output, text.getvalue())
    normal = detector.calibration.scores[detector.config.score]
    _, above = scoring.threshold_at(normal, detector.config.quantile)
    print(
        f"{len(paths)} images: {', '.join(f'{n} {kind}' for kind, n in counts.items())}; of normal "
        f"images {above:.1%} are expected above the threshold, by {len(normal)} held out"
        + (f"; written to {args.output}" if args.output else ""),
        file=sys.stderr,
    )
    return 1 if counts["unreadable"] else 0


def find_images(inputs: list[Path]) -> list[Path]:
    """Files as given, and the images in folders and their sub-folders, sorted in each."""
    from ganomaly.images import SUFFIXES, note_others

    paths = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            hidden = {p for p in inside if any(n[0] == "." for n in p.relative_to(path).parts)}
            inside = [p for p in inside if p.is_file() and p not in hidden]
            if not inside:
                raise UserError(f"{path}: no images ({', '.join(sorted(SUFFIXES))}) in this folder")
            paths += inside
            note_others(path, path.rglob("*"))
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such image or folder")
    return paths


def check_output(output: Path | None, inputs: list[Path]) -> None:
    """Before an hour of scoring, not behind it."""
    if output is None:
        return
    if output.is_dir():
        raise UserError(f"--output {output}: a folder; name a file")
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise UserError(f"--output {output}: is an input of this command; name another file")
    output.parent.mkdir(parents=True, exist_ok=True)


def write_output(output: Path, text: str) -> None:
    """Whole or not at all; through a link to its target, into a pipe or device as it is."""
    from ganomaly.files import write_atomic

    if output.exists() and not output.is_file():
        output.write_text(text, encoding="utf-8", errors="surrogateescape")
    else:
        write_atomic(output.resolve(), text)


def scored(detector, paths: list[Path]):
    """Yield every path with its headline score, or with the reason why it cannot be read."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from ganomaly.images import decode
    from ganomaly.scoring import BATCH

    config = detector.config
    results = decode(paths, config.image_size, config.channels)
    batch = []
    for path, pixels in tqdm(zip(paths, results), "scoring", len(paths), leave=False, disable=None):
        batch.append((path, pixels))
        if len(batch) < BATCH and path is not paths[-1]:
            continue
        readable = [pixels for _, pixels in batch if not isinstance(pixels, str)]
        if readable:
            images = torch.from_numpy(np.stack(readable))
            scores = iter(detector.scores(images)[config.score].tolist())
        for path, pixels in batch:
            yield path, pixels if isinstance(pixels, str) else next(scores)
        batch = []


if __name__ == "__main__":
    sys.exit(guard(main))
