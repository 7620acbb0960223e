"""Write a trained model as one file that needs nothing of ours; the suffix of --output decides.

.pt2 is a torch.export program. .onnx is for ONNX Runtime; there it is compared with the model
before it is written. The input `images` is uint8 (B, C, S, S) of any B. Colours are in the order
RGB. Photographs are reduced by a filter that averages, as Pillow's BILINEAR or OpenCV's INTER_AREA.
The outputs are `scores` (B,), `defective` (B,), which says whether each score is above the
threshold, and `heat_maps` (B, S, S), as ganomaly.detector has them: normalisation, calibration and
threshold are inside.
"""

import io
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from ganomaly import cli
from ganomaly.batches import to_input
from ganomaly.detector import Detector, load_detector, measured_by, outputs_of
from ganomaly.errors import UserError, guard
from ganomaly.files import check_output, write_output
from ganomaly.runs.results import promise
from ganomaly.scoring import all_scores, heat_map, raw_scores

ONNX = ("onnx", "onnxscript", "onnxruntime")  # packages
SHAPES = ({0: torch.export.Dim("batch", min=1)},)


def main(argv=None) -> None:
    parser = cli.Parser(__doc__)
    cli.add_model_flags(parser, images=False)
    parser.add_argument("--output", type=Path, metavar="FILE", help="[model.pt2 beside the model]")
    args = parser.parse_args(argv)
    output = args.output or args.model.with_suffix(".pt2")
    to_onnx = output.suffix == ".onnx"
    if not to_onnx and output.suffix != ".pt2":
        raise UserError(f"--output {output}: must end in .pt2 (torch) or .onnx (ONNX Runtime)")
    if to_onnx and not all(map(find_spec, ONNX)):
        raise UserError(f"export to ONNX needs {', '.join(ONNX)}: pip install {' '.join(ONNX)}")

    detector = load_detector(args.model, torch.device("cpu"))
    detector.set_quantile(args.quantile, args.score)
    c, side = detector.config, detector.config.image_size
    check_output(output, [args.model])
    if to_onnx and args.model.stat().st_size > 2e9:
        raise UserError(f"{args.model}: over 2 GB, too large for ONNX; name a .pt2 file")
    images = torch.zeros(2, c.channels, side, side, dtype=torch.uint8)
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch's own exporters
        program = torch.export.export(Program(detector), (images,), dynamic_shapes=SHAPES)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it has paths of this machine
        if to_onnx:
            buffer.write(onnx_file(program, detector))
        else:
            torch.export.save(program, buffer)
    write_output(output, buffer.getvalue())
    print(
        f"{output}: uint8 (B, {c.channels}, {side}, {side}) -> {c.score} scores (B,), verdicts "
        f"(B,), heat maps (B, {side}, {side}); {promise(len(detector.normal), c.quantile)}"
    )


class Program(nn.Module):
    """What a detector says of uint8 images (B, C, S, S)."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector
        self.networks = nn.ModuleDict(detector.networks)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detector, fitted = self.detector, self.detector.statistics
        score = detector.config.score
        o = outputs_of(self.networks, to_input(images, images.device, detector.scale))
        m = measured_by(self.networks, o, detector.config.tta)
        scores = all_scores(raw_scores(m), fitted, [score])[score]
        return scores, scores > detector.threshold, heat_map(m, fitted)


def onnx_file(program: torch.export.ExportedProgram, detector: Detector) -> bytes:
    """UserError where ONNX Runtime's scores or heat maps of noise are not the detector's."""
    import onnxruntime  # late: optional

    converted = torch.onnx.export(
        program, input_names=["images"], output_names=["scores", "defective", "heat_maps"],
        dynamic_shapes=SHAPES, dynamo=True, verbose=False,
    )  # fmt: skip
    content = converted.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    c = detector.config
    for n in (1, 3):
        images = torch.randint(256, (n, c.channels, c.image_size, c.image_size), dtype=torch.uint8)
        scores, _, heat_maps = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        pairs = [(detector(images).scores, scores), (detector.heat_maps(images), heat_maps)]
        if not all((a - b).abs().max() <= 1e-4 * a.abs().max() for a, b in pairs):
            raise UserError("ONNX Runtime does not give the model's scores; name a .pt2 file")
    return content


if __name__ == "__main__":
    sys.exit(guard(main))
