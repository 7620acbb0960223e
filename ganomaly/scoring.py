"""Raw anomaly scores, maps of them, and their calibration on held-out normal images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS = 5

_ROWS = torch.tensor([1.0, 0.0, -1.0]).view(1, 1, 3, 1).expand(1, 1, 3, 3) / 3
PREWITT = torch.cat([_ROWS, _ROWS.transpose(2, 3)])  # (2, 1, 3, 3), of rows and of columns
_BELL = torch.exp(-torch.arange(-3.0, 4.0).square() / 2)
_BELL = _BELL / _BELL.sum()
GAUSSIAN = torch.outer(_BELL, _BELL)  # (7, 7), of one pixel


class Outputs(NamedTuple):
    """What the networks make of a batch, float32."""

    x: Tensor  # (B, C, S, S) as batches.to_input makes it
    x_hat: Tensor  # (B, C, S, S) in [-1, 1]
    z: Tensor  # (B, latent_dim)
    z_hat: Tensor  # (B, latent_dim)
    f: Tensor  # (B, K, 4, 4) the discriminator's features of x
    f_hat: Tensor  # (B, K, 4, 4) and of x_hat
    logits: Tensor | None  # (B, S, S) the comparator's, where there is one


# Maps (B, S, S) of how anomalous a pixel is, from which scores and heat maps are made


def residual_map(o: Outputs) -> Tensor:
    """|mean of x - x_hat over 5x5 pixels|, a mean over channels: what is missing, not its noise."""
    difference = (o.x - o.x_hat).contiguous()  # channels last would take twice the time
    means = F.avg_pool2d(difference, 5, stride=1, padding=2, count_include_pad=False)
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
        # F.interpolate's, which under --deterministic takes another formula for its gradient's sake
        total += torch.ops.aten.upsample_bilinear2d(difference, total.shape[-2:], False)
    return blurred(total[:, 0] / 4)


def gradient_magnitude(grey: Tensor) -> Tensor:
    """Prewitt's, of (B, 1, h, w)."""
    kernels = PREWITT.to(grey.device, non_blocking=True)
    padded = F.pad(grey, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernels).square().sum(1, keepdim=True).add(1e-12).sqrt()


def blurred(m: Tensor) -> Tensor:
    """A map (B, S, S) under a Gaussian of one pixel, cut off after three."""
    kernels = GAUSSIAN.to(m.device, non_blocking=True)
    kernels = kernels.expand(m.shape[0], 1, 7, 7)  # a channel per image: the fastest
    return F.conv2d(F.pad(m, (3, 3, 3, 3), mode="reflect"), kernels, groups=m.shape[0])


def comparator_map(o: Outputs) -> Tensor:
    """The comparator's logits, a little blurred so that one odd pixel does not decide."""
    return blurred(o.logits)


def highest(m: Tensor) -> Tensor:
    """Mean of the highest hundredth of a map's pixels: (B, S, S) -> (B,)."""
    pixels = m.flatten(1)
    return pixels.topk(max(1, int(0.01 * pixels.shape[1]))).values.mean(1)


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


def raw_of(o: Outputs, names) -> Raw:
    """The scores of SCORES that `names` has, of one batch."""
    scores = {name: score(o) for name, score in SCORES.items() if name in names}
    return Raw(scores, (o.z - o.z_hat).double())


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
    """Squared Mahalanobis distance of z - z_hat, per latent dimension: (N,) float32."""
    centred = gaps - mean
    return ((centred @ precision) * centred).mean(1).float()


def fit_whitening(gaps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse Ledoit-Wolf covariance of z - z_hat (n, latent_dim)."""
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(gaps.numpy())
    return torch.from_numpy(fitted.location_), torch.from_numpy(fitted.precision_)


def fit(raw: Raw) -> Statistics:
    """Of n normal images; a deviation is at least 1e-12."""
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


def heat_map(o: Outputs, known: Statistics) -> Tensor:
    """Anomaly of every pixel: (B, S, S).

    The mean of the maps, each on the scale of its image-level score: 0 is what the most anomalous
    pixels of a normal image have in the mean, 1 a deviation more. One scale for all images, so
    that two of them compare.
    """
    parts = [(MAPS[name](o) - mean) / dev for name, (mean, dev) in known.parts.items()]
    return sum(parts) / len(parts)


def calibrate(raw: Raw, seed: int) -> Calibration:
    """Statistics from all calibration images, scores from five folds.

    Each image's scores use statistics of the other four fifths: fitted and thresholded on the same
    few images, a nominal 5 % of false alarms becomes far more.
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
    rank = rank_at(n, quantile)
    return float(normal.sort().values[rank - 1]), 1 - rank / (n + 1)


def rank_at(n: int, quantile: float) -> int:
    # Rounded first: (19 + 1) * .95 is 19.000000000000004 in floating point.
    return max(1, min(n, math.ceil(round((n + 1) * quantile, 9))))


def p_values(normal: Tensor, scores: Tensor) -> Tensor:
    """Share of normal images that score as high: (N,) float64, at least 1 / (n + 1).

    normal: (n,) as in threshold_at. At most a share p of images as normal as those has a p-value of
    at most p (conformal prediction). A score is above the threshold exactly where its p-value is at
    most the share that threshold_at expects there.
    """
    below = torch.searchsorted(normal.sort().values, scores.contiguous())  # strictly
    return (1 + len(normal) - below).double() / (1 + len(normal))
