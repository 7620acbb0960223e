"""Raw anomaly scores, their calibration on held-out normal images, and the trained detector.

Networks are in eval mode and float32 here, so that a score depends on neither batch size, batch
mates nor order, and scoring changes no buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ganomaly import config as configuration
from ganomaly.batches import to_input
from ganomaly.config import Config
from ganomaly.errors import UserError
from ganomaly.files import read_torch
from ganomaly.networks import build

BATCH = 64  # images a scoring pass; memory, not results, depends on it
FOLDS = 5


class Outputs(NamedTuple):
    """What the networks make of a batch, float32."""

    x: Tensor  # (B, C, S, S) in [-1, 1]
    x_hat: Tensor  # (B, C, S, S)
    z: Tensor  # (B, latent_dim)
    z_hat: Tensor  # (B, latent_dim)
    f: Tensor  # (B, K, 4, 4) the discriminator's features of x
    f_hat: Tensor  # (B, K, 4, 4) and of x_hat
    logits: Tensor | None  # (B, S, S) the comparator's, where there is one


# Maps (B, S, S) of how anomalous a pixel is, from which scores and heat maps are made


def residual_map(o: Outputs) -> Tensor:
    """|mean of x - x_hat over 5x5 pixels|, a mean over channels: what is missing, not its noise."""
    means = F.avg_pool2d(o.x - o.x_hat, 5, stride=1, padding=2, count_include_pad=False)
    return means.abs().mean(1)


def gradient_map(o: Outputs) -> Tensor:
    """1 - gradient magnitude similarity of x and x_hat in grey, a mean over four scales.

    Xue et al., TIP 2014; over scales as in RIAD (Zavrtanik et al., Pattern Recognition 2021).
    """
    x, x_hat = o.x.mean(1, keepdim=True), o.x_hat.mean(1, keepdim=True)
    total = torch.zeros_like(x)
    for scale in range(4):
        if scale:
            x, x_hat = F.avg_pool2d(x, 2), F.avg_pool2d(x_hat, 2)
        a, b = gradient_magnitude(x), gradient_magnitude(x_hat)
        c = 0.0104  # the authors' .0026 is for a range of 1, ours is 2
        difference = 1 - (2 * a * b + c) / (a.square() + b.square() + c)
        total += F.interpolate(difference, total.shape[-2:], mode="bilinear")
    return blurred(total[:, 0] / 4)


def gradient_magnitude(grey: Tensor) -> Tensor:
    """Prewitt's, of (B, 1, h, w)."""
    rows = (
        torch.tensor([1.0, 0.0, -1.0], device=grey.device).view(1, 1, 3, 1).expand(1, 1, 3, 3) / 3
    )
    kernels = torch.cat([rows, rows.transpose(2, 3)])
    padded = F.pad(grey, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernels).square().sum(1, keepdim=True).add(1e-12).sqrt()


def blurred(m: Tensor) -> Tensor:
    """A map (B, S, S) under a Gaussian of one pixel."""
    from torchvision.transforms.functional import gaussian_blur  # late: it takes a second to import

    return gaussian_blur(m, [7, 7], [1.0, 1.0])


def comparator_map(o: Outputs) -> Tensor:
    """The comparator's logits, a little blurred so that one odd pixel does not decide."""
    return blurred(o.logits)


def highest(m: Tensor, share: float = 0.01) -> Tensor:
    """Mean of the highest hundredth of a map's pixels: (B, S, S) -> (B,)."""
    pixels = m.flatten(1)
    return pixels.topk(max(1, int(share * pixels.shape[1]))).values.mean(1)


MAPS = {"residual": residual_map, "gradient": gradient_map, "comparator": comparator_map}

# Scores that need to know nothing of other images. `latent` is what the released code computes
# for the paper's eq. 5, `latent_l1` what the paper prints there.
SCORES = {
    "latent": lambda o: (o.z - o.z_hat).square().mean(1),
    "latent_l1": lambda o: (o.z - o.z_hat).abs().mean(1),
    "contextual": lambda o: (o.x - o.x_hat).abs().mean((1, 2, 3)),
    "feature": lambda o: (o.f - o.f_hat).square().mean((1, 2, 3)),
    "residual": lambda o: highest(residual_map(o)),
    "gradient": lambda o: highest(gradient_map(o)),
    "comparator": lambda o: comparator_map(o).amax((1, 2)),
}


@dataclass
class Raw:
    """Scores of N images before any calibration."""

    scores: dict[str, Tensor]  # name -> (N,) float32
    gaps: Tensor  # (N, latent_dim) float64, z - z_hat

    def __getitem__(self, index: Tensor) -> Raw:
        return Raw({name: s[index] for name, s in self.scores.items()}, self.gaps[index])


@dataclass
class Statistics:
    """What is known of normal images that were not trained on."""

    mean: Tensor  # (latent_dim,) float64, of z - z_hat
    precision: Tensor  # (latent_dim, latent_dim) float64, inverse Ledoit-Wolf covariance
    parts: dict[str, tuple[float, float]]  # mean and deviation of the scores that have a map


@dataclass
class Calibration:
    statistics: Statistics
    scores: dict[str, Tensor]  # name -> (n,) float32, sorted out-of-fold scores


def whitened(gaps: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """Squared Mahalanobis distance of z - z_hat, a latent dimension: (N,) float32."""
    centred = gaps - mean
    return ((centred @ precision) * centred).mean(1).float()


def fit_whitening(gaps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse Ledoit-Wolf covariance of z - z_hat (n, latent_dim)."""
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(gaps.numpy())
    return torch.from_numpy(fitted.location_), torch.from_numpy(fitted.precision_)


def fit(raw: Raw) -> Statistics:
    parts = {name: raw.scores[name].double() for name in MAPS if name in raw.scores}
    return Statistics(
        *fit_whitening(raw.gaps),
        {name: (float(s.mean()), max(float(s.std()), 1e-12)) for name, s in parts.items()},
    )


def all_scores(raw: Raw, known: Statistics) -> dict[str, Tensor]:
    """Every anomaly score: name -> (N,) float32.

    `calibrated` is the mean of residual, gradient and comparator, each in deviations from its mean
    over normal images.
    """
    z_scores = [(raw.scores[name] - mean) / dev for name, (mean, dev) in known.parts.items()]
    return {
        **raw.scores,
        "latent_whitened": whitened(raw.gaps, known.mean, known.precision),
        "calibrated": torch.stack(z_scores).mean(0),
    }


def calibrate(raw: Raw, seed: int) -> Calibration:
    """Statistics from all calibration images, scores from five folds.

    Each image's scores use statistics of the other four fifths: fitted and thresholded on the same
    few images, a nominal 5 % of false alarms becomes most of them.
    """
    n = len(raw.gaps)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    scores: dict[str, Tensor] = {}
    for fold in order.tensor_split(FOLDS):
        others = order[~torch.isin(order, fold)]
        for name, values in all_scores(raw[fold], fit(raw[others])).items():
            scores.setdefault(name, torch.empty(n))[fold] = values
    return Calibration(fit(raw), {name: s.sort().values for name, s in scores.items()})


def threshold_at(normal: Tensor, quantile: float) -> tuple[float, float]:
    """A threshold, and the share of normal images above it in the mean over draws of the n.

    normal: (n,) scores of normal images that neither training nor the statistics have seen. The
    value of rank ceil((n + 1) quantile) has at most 1 - quantile above it (split conformal
    prediction); with fewer than quantile / (1 - quantile) images there is no such rank, and the
    largest score has 1 / (n + 1) above it.
    """
    n = len(normal)
    # Rounded first: (19 + 1) * .95 is 19.000000000000004 in floating point.
    rank = min(n, math.ceil(round((n + 1) * quantile, 9)))
    return float(normal.sort().values[rank - 1]), 1 - rank / (n + 1)


@dataclass
class Detector:
    """A trained model with what it knows of normal images; what model.pt holds."""

    networks: dict[str, nn.Module]  # as networks.build names them
    config: Config
    device: torch.device
    scale: float | None = None  # of the normalised input, see batches.to_input
    calibration: Calibration | None = None
    threshold: float | None = None  # of the headline score

    def __post_init__(self):
        for network in self.networks.values():
            network.to(self.device, memory_format=torch.channels_last)
            network.eval().requires_grad_(False)

    @torch.inference_mode()
    def outputs(self, pixels: Tensor) -> Outputs:
        """One batch, uint8 (B, C, S, S) -> Outputs."""
        x = to_input(pixels, self.device, self.scale)
        with torch.autocast(self.device.type, enabled=False):  # whatever a caller has on
            z, x_hat, z_hat = self.networks["generator"](x)
            _, f = self.networks["discriminator"](x)
            _, f_hat = self.networks["discriminator"](x_hat)
            comparator = self.networks.get("comparator")
            logits = None if comparator is None else comparator(x, x_hat)
        return Outputs(x, x_hat, z, z_hat, f, f_hat, logits)

    def calibrate(self, pixels: Tensor) -> None:
        """Learn from uint8 normal images (n, C, S, S) that were not trained on."""
        self.calibration = calibrate(self.raw(pixels), self.config.seed)
        normal = self.calibration.scores[self.config.score]
        self.threshold, _ = threshold_at(normal, self.config.quantile)

    def each(self, pixels: Tensor, function: Callable[[Outputs], Any]) -> list:
        """function of the Outputs of every batch of uint8 images (N, C, S, S), in float32."""
        parts = pixels.split(BATCH)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            bar = tqdm(parts, "scoring", leave=False, disable=None, delay=2)
            return [function(self.outputs(batch)) for batch in bar]

    def raw(self, pixels: Tensor) -> Raw:
        """All uncalibrated scores of uint8 images (N, C, S, S), one pass.

        UserError where one is not finite, as of a network that diverged.
        """
        names = [name for name in SCORES if name in self.config.scores]
        parts = self.each(
            pixels,
            lambda o: (
                {name: SCORES[name](o).cpu() for name in names},
                (o.z - o.z_hat).double().cpu(),
            ),
        )
        scores = {name: torch.cat([part[name] for part, _ in parts]) for name in names}
        raw = Raw(scores, torch.cat([gaps for _, gaps in parts]))
        for name, values in {**raw.scores, "z - z_hat": raw.gaps}.items():
            if not values.isfinite().all():
                raise UserError(f"{name} is not finite: the training diverged, lower --lr")
        return raw

    def scores(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every anomaly score of uint8 images (N, C, S, S): name -> (N,) float32."""
        return all_scores(self.raw(pixels), self.calibration.statistics)

    def heat_maps(self, pixels: Tensor) -> Tensor:
        """Anomaly of every pixel of uint8 images (N, C, S, S): (N, S, S) float32, on the CPU.

        The mean of the maps, each on the scale of its image-level score: 0 is what the most
        anomalous pixels of a normal image have in the mean, 1 a deviation more. One scale for all
        images, so that two of them compare.
        """
        known = self.calibration.statistics.parts
        maps = self.each(
            pixels,
            lambda o: sum(
                (MAPS[name](o) - mean) / dev for name, (mean, dev) in known.items()
            ).cpu(),
        )
        return torch.cat(maps) / len(known)

    def state(self) -> dict:
        """The content of model.pt: tensors, numbers and text only."""
        return {
            "config": self.config.to_json(),
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "statistics": vars(self.calibration.statistics),
            "scores": self.calibration.scores,
            "threshold": self.threshold,
            "scale": self.scale,
        }


def load_detector(path, device: torch.device) -> Detector:
    """The detector in a model.pt; UserError where the file is not one."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such model; make train writes model.pt files")
    try:
        state = read_torch(Path(path))
        config = configuration.from_json(state["config"])
        networks = build(config)
        for name, network in networks.items():
            network.load_state_dict(state["networks"][name])
        calibration = Calibration(Statistics(**state["statistics"]), state["scores"])
        threshold, scale = float(state["threshold"]), state["scale"]
        if (scale is None) != (config.normalise == "none"):
            raise ValueError
        nothing = Raw(
            {name: torch.zeros(1) for name in SCORES}, torch.zeros(1, config.latent_dim).double()
        )
        all_scores(nothing, calibration.statistics)  # raises where shapes or names don't fit
        if calibration.scores.keys() != set(config.scores):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, UserError):
        raise UserError(
            f"{path}: not a model.pt of this version; name the one in the folder of a finished run"
        ) from None
    return Detector(networks, config, device, scale, calibration, threshold)
