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

import torch
from torch import Tensor, nn

from ganomaly import cli
from ganomaly.batches import to_input
from ganomaly.detector import Detector, load_detector, outputs_of
from ganomaly.errors import guard
from ganomaly.files import check_output, write_output
from ganomaly.scoring import all_scores, heat_map, raw_scores


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="[model.pt2 beside the model]")
    args = parser.parse_args(argv)

    detector = load_detector(args.model, torch.device("cpu"))
    c = detector.config
    above = detector.set_quantile(args.quantile or c.quantile)
    output = args.output or args.model.with_suffix(".pt2")
    check_output(output, [args.model])
    images = torch.zeros(2, c.channels, c.image_size, c.image_size, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(Program(detector), (images,), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    warnings.filterwarnings("ignore", "No complete tensor")  # meant for shared weights on a GPU
    torch.export.save(program, buffer)
    write_output(output, buffer.getvalue())
    print(
        f"{output}: uint8 (B, {c.channels}, {c.image_size}, {c.image_size}) -> {c.score} scores "
        f"(B,), verdicts (B,), heat maps (B, {c.image_size}, {c.image_size}); {above:.1%} of "
        "normal images are expected above the threshold"
    )
    return 0


class Program(nn.Module):
    """What a detector says of uint8 images (B, C, S, S)."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector
        self.networks = nn.ModuleDict(detector.networks)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detector, fitted = self.detector, self.detector.calibration.statistics
        score = detector.config.score
        o = outputs_of(self.networks, to_input(images, images.device, detector.scale))
        scores = all_scores(raw_scores(o), fitted, [score])[score]
        return scores, scores > detector.threshold, heat_map(o, fitted)


if __name__ == "__main__":
    sys.exit(guard(main))
