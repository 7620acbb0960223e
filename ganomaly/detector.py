"""The trained detector: scores, verdicts and heat maps of images, and model.pt.

Networks are in eval mode and float32 here. The score of an image depends on this image alone: among
other images it differs by rounding only, at most by 1e-5 of its size. Scoring changes no buffer.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from ganomaly import scoring
from ganomaly.batches import from_input, to_input
from ganomaly.config import Config, from_json
from ganomaly.errors import UserError, out_of_memory, reason_of
from ganomaly.files import model_file, read_torch
from ganomaly.images import Kind, note_odd, read_images
from ganomaly.networks import build
from ganomaly.packed import packed
from ganomaly.scoring import Measured, Outputs, Statistics, p_values

PASS_IMAGES, PASS_PIXELS = 64, 2**20  # limits of one scoring pass; they bound its memory
MOVES = ((1, -2), (-1, -2), (1, -1), (-1, -1))  # one pixel down, up, right, left


class Verdicts(NamedTuple):
    """What a detector says of N images."""

    scores: Tensor  # (N,) float32, the headline anomaly score: higher is more anomalous
    p_values: Tensor  # (N,) float64, the share of normal images that score as high
    defective: Tensor  # (N,) bool, score > threshold


def outputs_of(networks, x: Tensor) -> Outputs:
    """Run networks, named as by networks.build, on x (B, C, S, S) made by to_input."""
    z, x_hat, z_hat = networks["generator"](x)
    # Both in one call, which reads the weights once
    features = networks["discriminator"].features(torch.cat([x, x_hat]))
    logits = networks["comparator"](x, x_hat) if "comparator" in networks else None
    return Outputs(x, x_hat, z, z_hat, *features.unflatten(0, (2, -1)), logits)


def moved(images: Tensor, step: int, dim: int) -> Tensor:
    """Images (..., S, S), or maps, moved by `step` pixels along a dimension; the edge repeats."""
    places = torch.arange(images.shape[dim], device=images.device) - step
    return images.index_select(dim, places.clamp(0, images.shape[dim] - 1))


def measured_by(networks, o: Outputs, tta: bool) -> Measured:
    """scoring.measure; with `tta` half from the images, half from copies moved by MOVES."""
    own = scoring.measure(o)
    if not tta:
        return own
    copies = torch.cat([moved(o.x, step, dim) for step, dim in MOVES])
    others = scoring.measure(outputs_of(networks, copies))
    others = tree_map(lambda values: values.unflatten(0, (len(MOVES), -1)), others)  # (4, B, ...)
    maps = {
        name: torch.stack([moved(m, -step, dim) for m, (step, dim) in zip(four, MOVES)])
        for name, four in others.maps.items()
    }
    return tree_map(lambda a, b: (a + b.mean(0)) / 2, own, others._replace(maps=maps))


@dataclass(repr=False)
class Detector:
    """A trained model and its calibration: the content of model.pt. It copies the networks."""

    networks: dict[str, nn.Module]  # named as by networks.build
    config: Config
    device: torch.device
    scale: float | None = None  # of the normalised input, see batches.to_input
    statistics: Statistics | None = None  # of the calibration images
    normal_scores: dict[str, Tensor] | None = None  # theirs, sorted: name -> (n,) float32
    threshold: float | None = None  # of the headline score
    kind: Kind = Kind()  # of the training images
    trained_on: Sequence[str] = ()  # data.fingerprints of the training images
    scoring_networks: dict[str, nn.Module] = field(init=False)

    def __post_init__(self):
        self.networks = copy.deepcopy(self.networks)
        for network in self.networks.values():
            network.to(self.device, memory_format=torch.channels_last)
            network.eval().requires_grad_(False)
        self.scoring_networks = dict(self.networks)
        if self.device.type == "cpu" and torch.backends.mkldnn.is_available():
            # The comparator's 3x3 layers would gain nothing
            for name in ("generator", "discriminator"):
                self.scoring_networks[name] = packed(self.networks[name])

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<Detector of {c.category or c.dataset}: score {c.score}, threshold {self.threshold}, "
            f"images of {c.channels}x{c.image_size}x{c.image_size}, on {self.device}>"
        )

    @property
    def batch(self) -> int:
        """Images of one scoring pass; fewer with test-time augmentation, which adds copies."""
        most = min(PASS_IMAGES, PASS_PIXELS // self.config.image_size**2)
        return max(1, most // len(MOVES) if self.config.tta else most)

    @torch.inference_mode()
    def outputs(self, pixels: Tensor) -> Outputs:
        """One batch, uint8 (B, C, S, S) -> Outputs."""
        return outputs_of(self.scoring_networks, to_input(pixels, self.device, self.scale))

    def calibrate(self, pixels: Tensor) -> None:
        """Learn from uint8 normal images (n, C, S, S) that were not trained on."""
        self.statistics, self.normal_scores = scoring.calibrate(self.raw(pixels), self.config.seed)
        self.set_quantile()

    @property
    def normal(self) -> Tensor:
        """The headline scores of the calibration images: (n,) float32, sorted."""
        return self.normal_scores[self.config.score]

    def set_quantile(self, quantile: float | None = None, score: str | None = None) -> None:
        """Move the threshold: to another quantile, or to that of another headline score."""
        quantile = self.config.quantile if quantile is None else quantile
        score = score or self.config.score
        if score not in self.normal_scores:
            raise UserError(f"score: {score} is none of {', '.join(self.normal_scores)}")
        self.config = self.config.replace(quantile=quantile, score=score)
        self.threshold = scoring.threshold_at(self.normal, quantile)

    def __call__(self, images: Tensor | np.ndarray | str | Path | Sequence[str | Path]) -> Verdicts:
        """Verdicts on uint8 images (N, C, S, S), or on image files (one or several) of any size.

        A tensor has its channels in the order RGB. Reduce images by a filter that averages, as
        Pillow's BILINEAR does for files. A filter that leaves pixels out changes the verdicts.
        UserError names the files that cannot be read. ValueError names the tensor that is needed.
        """
        c = self.config
        if isinstance(images, np.ndarray) and images.dtype.kind not in "OU":  # no array of paths
            images = torch.from_numpy(np.ascontiguousarray(images))
        if not isinstance(images, Tensor):
            paths = [images] if isinstance(images, str | Path) else list(images)
            if not all(isinstance(path, str | Path) for path in paths):
                raise ValueError("images are paths of files, or one uint8 tensor (N, C, S, S)")
            images, facts = read_images(paths, c.image_size, c.channels, self.kind.full_scale)
            note_odd(paths, facts, self.kind)
        if images.dtype != torch.uint8 or images.shape[1:] != (c.channels, *[c.image_size] * 2):
            raise ValueError(
                f"images are {images.dtype} of {tuple(images.shape)}; uint8 of "
                f"(N, {c.channels}, {c.image_size}, {c.image_size}) is needed, 0 to 255"
            )
        return self.verdicts(self.scores(images)[c.score] if len(images) else torch.empty(0))

    def verdicts(self, scores: Tensor) -> Verdicts:
        """Verdicts on headline scores (N,)."""
        return Verdicts(scores, p_values(self.normal, scores), scores > self.threshold)

    @torch.inference_mode()
    def map_batches(self, pixels: Tensor, function: Callable[[Outputs, Measured], Any]) -> Any:
        """function(outputs, measured) of uint8 images (N, C, S, S), joined on the CPU.

        UserError where one is not finite, as after a training that diverged.
        """
        bar = tqdm(pixels.split(self.batch), "scoring", leave=False, disable=None, delay=2)
        parts = []
        with torch.autocast(self.device.type, enabled=False):  # a caller may have it on
            for batch in bar:
                o = self.outputs(batch)
                m = measured_by(self.scoring_networks, o, self.config.tta)
                parts.append(tree_map(Tensor.cpu, function(o, m)))
        joined = tree_map(lambda *tensors: torch.cat(tensors), *parts)
        if not all(tensor.isfinite().all() for tensor in tree_leaves(joined)):
            raise UserError("a score is not finite: the training diverged, lower --lr")
        return joined

    def raw(self, pixels: Tensor) -> Measured:
        """All uncalibrated scores of uint8 images (N, C, S, S)."""
        return self.map_batches(pixels, lambda o, m: scoring.raw_scores(m))

    def scores(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every anomaly score of uint8 images (N, C, S, S): name -> (N,) float32."""
        return scoring.all_scores(self.raw(pixels), self.statistics, self.normal_scores)

    def heat_maps(self, pixels: Tensor) -> Tensor:
        """scoring.heat_map of uint8 images (N, C, S, S): (N, S, S) float32, on the CPU."""
        return self.map_batches(pixels, lambda o, m: scoring.heat_map(m, self.statistics))

    def explain(self, pixels: Tensor) -> tuple[Verdicts, Tensor, Tensor]:
        """Verdicts, uint8 reconstructions (N, C, S, S) and heat maps (N, S, S), in one pass."""
        fitted, name = self.statistics, self.config.score
        raw, x_hat, heat = self.map_batches(
            pixels, lambda o, m: (scoring.raw_scores(m), o.x_hat, scoring.heat_map(m, fitted))
        )
        verdicts = self.verdicts(scoring.all_scores(raw, fitted, [name])[name])
        return verdicts, from_input(x_hat, pixels, self.scale), heat

    def state(self) -> dict:
        """The content of model.pt: tensors, numbers and text only."""
        return {
            "config": self.config.to_json(),
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "statistics": vars(self.statistics),
            "scores": self.normal_scores,
            "threshold": self.threshold,
            "scale": self.scale,
            "kind": tuple(self.kind),
            "trained_on": self.trained_on,
        }


def load_detector(path, device: torch.device) -> Detector:
    """The detector in a model.pt, or in a run's folder; UserError where there is none.

    A model may be older than some scores; calibrate() adds them.
    """
    path = model_file(path)
    try:
        state = read_torch(path)
        config = from_json(state["config"])
        networks = build(config)
        for name, network in networks.items():
            network.load_state_dict(state["networks"][name])
        statistics, scores = Statistics(**state["statistics"]), state["scores"]
        threshold, scale = state["threshold"], state["scale"]
        kind, trained_on = Kind(*state.get("kind", ())), state.get("trained_on", ())
        if not {config.score} <= scores.keys() <= set(config.scores):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, UserError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"{path}: not a model.pt of this version; name the one in the folder of a finished run"
            f"{reason_of(error)}"
        ) from None
    return Detector(
        networks, config, device, scale, statistics, scores, threshold, kind, trained_on
    )
