"""Calibrate a trained model on other good images; nothing is trained.

Use it when the lamp or the material has changed, or for a stricter threshold. It learns the
statistics of normal images and the threshold again, from good images that were not trained on.
They go into a new model file.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly import cli
from ganomaly.data import MIN_CALIBRATION, fingerprints
from ganomaly.detector import load_detector
from ganomaly.device import use_device, use_threads
from ganomaly.errors import UserError, guard
from ganomaly.files import check_output, write_torch
from ganomaly.images import note_odd, read_images
from ganomaly.paths import find_images
from ganomaly.runs.results import promise


def main(argv=None) -> None:
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="[calibrated.pt by the model]")
    parser.add_argument("--tta", help="test-time augmentation [as trained]", **cli.READ["bool"])
    args = parser.parse_args(argv)

    detector = load_detector(args.model, use_device(args.device))
    use_threads(detector.config.threads)
    config, output = detector.config, args.output or args.model.with_name("calibrated.pt")
    detector.set_quantile(args.quantile, args.score)
    paths = [path for text in args.images for path, _ in find_images(text)]
    check_output(output, [args.model, *paths])
    images, facts = read_images(paths, config.image_size, config.channels, detector.kind.full_scale)
    note_odd(paths, facts, detector.kind)
    distinct = {mark: i for i, mark in enumerate(fingerprints(images))}
    # Sorted, as the folds follow their order
    new = [distinct[mark] for mark in sorted(distinct.keys() - set(detector.trained_on))]
    if copies := len(paths) - len(distinct):
        print(f"note: {copies} copies of others are left out", file=sys.stderr)
    if trained := len(distinct) - len(new):
        print(f"note: {trained} images that the model was trained on are left out", file=sys.stderr)
    images, n = images[new], len(new)
    if n < MIN_CALIBRATION:
        raise UserError(f"--images: {n} images; at least {MIN_CALIBRATION} are needed")
    before, old = detector(images).defective, detector.threshold
    if args.tta is not None:
        detector.config = detector.config.replace(tta=args.tta)
    detector.calibrate(images)
    write_torch(Path(os.path.realpath(output)), detector.state())
    now = int((detector.normal > detector.threshold).sum())
    print(f"before: {int(before.sum())} of these {n} images are above the threshold {old:.6g}")
    print(f"now: {now} of these {n} images are above the threshold {detector.threshold:.6g}")
    print(f"score {detector.config.score}: {promise(n, detector.config.quantile)}")
    print(f"written {output}")


if __name__ == "__main__":
    sys.exit(guard(main))
