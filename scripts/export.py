"""Write a trained model as one torch.export program, which needs torch and nothing of ours.

Its input is uint8 images (B, C, S, S) of any B; its outputs are the scores (B,), whether each is
above the threshold (B,), and heat maps (B, S, S), as ganomaly.detector has them: normalisation,
calibration and threshold are inside.
"""

import io
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser, add_model_flags, checked_quantile
from ganomaly.errors import UserError, guard, leaving_at_once

CLOSE = 1e-5  # of the program's scores to ours, relative


def main(argv=None) -> int:
    parser = Parser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="[model.pt2 beside the model]")
    args = parser.parse_args(argv)
    quantile = checked_quantile(args)

    with leaving_at_once():
        import torch

        from ganomaly.detector import load_detector
        from ganomaly.files import check_output, write_output

    detector = load_detector(args.model, torch.device("cpu"))
    c = detector.config
    above = detector.set_quantile(quantile or c.quantile)
    output = args.output or args.model.with_suffix(".pt2")
    if output.exists() and output.samefile(args.model):
        raise UserError(f"--output {output}: is the model; name another file")
    check_output(output)
    rng = torch.Generator().manual_seed(0)
    shape = (5, c.channels, c.image_size, c.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    program = exported(detector, images[:2])
    check(program.module(), detector, images)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that share memory, on a GPU; these do not
        torch.export.save(program, buffer)
    write_output(output, buffer.getvalue())
    print(
        f"{output}: uint8 (B, {c.channels}, {c.image_size}, {c.image_size}) -> {c.score} scores "
        f"(B,), verdicts (B,), heat maps (B, {c.image_size}, {c.image_size}); {above:.1%} of "
        "normal images are expected above the threshold"
    )
    return 0


def exported(detector, images):
    """The detector as a torch.export.ExportedProgram; images is an example, (2, C, S, S)."""
    import torch
    from torch import nn

    from ganomaly.batches import to_input
    from ganomaly.detector import outputs_of
    from ganomaly.scoring import all_scores, heat_map, raw_scores

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.networks = nn.ModuleDict(detector.networks)

        def forward(self, images):
            x = to_input(images, images.device, detector.scale)
            o = outputs_of(self.networks, x)
            known = detector.calibration.statistics
            scores = all_scores(raw_scores(o, detector.config.scores), known)[detector.config.score]
            return scores, scores > detector.threshold, heat_map(o, known)

    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(Program(), (images,), dynamic_shapes=({0: batch},))


def check(program, detector, images) -> None:
    """UserError where the program, at another batch size, does not say what the detector says."""
    import torch

    scores, defective, heat = program(images)
    ours = detector(images)
    same = torch.allclose(scores, ours.scores, rtol=CLOSE, atol=1e-6)
    same &= torch.allclose(heat, detector.heat_maps(images), rtol=1e-4, atol=1e-4)
    if not (same and torch.equal(defective, ours.defective)):
        raise UserError("the exported program's scores are not the model's; nothing was written")


if __name__ == "__main__":
    sys.exit(guard(main))
