"""Anomaly scores, maps of the anomaly, and their calibration on held-out normal images.

A new field of Statistics needs a default, so that older models can be read.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

FOLDS = 5

# Filters of the maps
_ROWS = torch.tensor([1.0, 0.0, -1.0]).view(1, 1, 3, 1).expand(1, 1, 3, 3) / 3
PREWITT = torch.cat([_ROWS, _ROWS.transpose(2, 3)])  # (2, 1, 3, 3), vertical and horizontal
_BELL = torch.exp(-torch.arange(-3.0, 4.0).square() / 2)
_BELL = _BELL / _BELL.sum()
GAUSSIAN = torch.outer(_BELL, _BELL)  # (7, 7), standard deviation one pixel


class Outputs(NamedTuple):
    """Input and outputs of the networks for one batch, float32."""

    x: Tensor  # (B, C, S, S) as batches.to_input makes it
    x_hat: Tensor  # (B, C, S, S) in [-1, 1]
    z: Tensor  # (B, latent_dim)
    z_hat: Tensor  # (B, latent_dim)
    f: Tensor  # (B, K, 4, 4) the discriminator's features of x
    f_hat: Tensor  # (B, K, 4, 4) the discriminator's features of x_hat
    logits: Tensor | None  # (B, S, S) the comparator's; None without one


# Maps (B, S, S): how anomalous each pixel is. Scores and heat maps are made from them.


def residual_map(o: Outputs) -> Tensor:
    """|mean of x - x_hat over 5x5 pixels|, averaged over channels. The mean removes noise."""
    difference = (o.x - o.x_hat).contiguous()  # channels last takes twice the time
    means = F.avg_pool2d(difference, 5, stride=1, padding=2, count_include_pad=False)
    return means.abs().mean(1)


def gradient_map(o: Outputs) -> Tensor:
    """1 - gradient magnitude similarity of x and x_hat in grey, averaged over four scales, blurred.

    Xue et al., TIP 2014; the scales are RIAD's (Zavrtanik et al., Pattern Recognition 2021).
    """
    x, x_hat = o.x.mean(1, keepdim=True), o.x_hat.mean(1, keepdim=True)
    total = torch.zeros_like(x)
    for scale in range(4):
        if scale:
            x, x_hat = F.avg_pool2d(x, 2), F.avg_pool2d(x_hat, 2)
        a, b = gradient_magnitude(x), gradient_magnitude(x_hat)
        c = 0.0104  # .0026 in the paper, for a range of 1; ours is 2
        difference = 1 - (2 * a * b + c) / (a.square() + b.square() + c)
        # Not F.interpolate: under --deterministic it uses another formula
        total += torch.ops.aten.upsample_bilinear2d(difference, total.shape[-2:], False)
    return blurred(total[:, 0] / 4)


def gradient_magnitude(grey: Tensor) -> Tensor:
    """Length of the Prewitt gradient of grey images (B, 1, h, w)."""
    kernels = PREWITT.to(grey.device, non_blocking=True)
    padded = F.pad(grey, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernels).square().sum(1, keepdim=True).add(1e-12).sqrt()


def blurred(m: Tensor) -> Tensor:
    """Maps (B, S, S) blurred by GAUSSIAN."""
    kernel = GAUSSIAN.to(m.device, non_blocking=True)
    padded = F.pad(m, (3, 3, 3, 3), mode="reflect")
    return F.conv2d(padded[:, None], kernel[None, None])[:, 0]


def contrast(o: Outputs) -> Tensor:
    """Standard deviation of grey x around each pixel, under GAUSSIAN: (B, S, S)."""
    grey = o.x.mean(1)
    return (blurred(grey.square()) - blurred(grey).square()).clamp_min(0).sqrt()


def mean_of_highest(m: Tensor, share: float) -> Tensor:
    """Mean of a share of a map's pixels, those with the highest values: (B, S, S) -> (B,)."""
    pixels = m.flatten(1)
    return pixels.topk(max(1, int(share * pixels.shape[1]))).values.mean(1)


PARTS = ("residual", "gradient", "comparator")  # maps of the score `calibrated` and of heat maps

# Scores of one image alone: Outputs -> (B,). For eq. 5 the released code computes `latent`; the
# paper prints `latent_l1`.
PLAIN_SCORES = {
    "latent": lambda o: (o.z - o.z_hat).square().mean(1),
    "latent_l1": lambda o: (o.z - o.z_hat).abs().mean(1),
    "contextual": lambda o: (o.x - o.x_hat).abs().mean((1, 2, 3)),
    "feature": lambda o: (o.f - o.f_hat).square().mean((1, 2, 3)),
}
# Scores that sum up a map of measure(): (B, S, S) -> (B,)
MAP_SCORES = {
    "residual": ("residual", lambda m: mean_of_highest(m, 0.01)),
    "gradient": ("gradient", lambda m: mean_of_highest(m, 0.01)),
    "comparator": ("comparator", lambda m: m.amax((1, 2))),
    "residual_wide": ("residual", lambda m: mean_of_highest(m, 0.1)),  # of large defects
    "spot": ("spot", lambda m: m.amax((1, 2))),  # of small ones
    "area": ("area", lambda m: mean_of_highest(m, 0.1)),  # of large ones
}


class Measured(NamedTuple):
    """Maps and scores of images before calibration. Those of an image's copies can be averaged."""

    maps: dict[str, Tensor]  # (N, S, S); none any more in raw_scores
    scores: dict[str, Tensor]  # PLAIN_SCORES, in raw_scores also MAP_SCORES: (N,) float32
    gaps: Tensor  # (N, latent_dim) float64, z - z_hat


def measure(o: Outputs) -> Measured:
    """Maps and scores of a batch; without a comparator, not its map."""
    maps = {"residual": residual_map(o), "gradient": gradient_map(o)}
    # Gradient and comparator at the same place. The factor brings both to a similar spread
    maps["spot"] = 10 * maps["gradient"]
    if o.logits is not None:
        maps["comparator"] = blurred(o.logits)  # so that no single pixel decides
        maps["spot"] = maps["spot"] + maps["comparator"]
    # Errors are larger where an image has more contrast; 0.4 is a fifth of the range of x
    maps["area"] = maps["residual"] / (0.4 + contrast(o))
    plain = {name: score(o) for name, score in PLAIN_SCORES.items()}
    return Measured(maps, plain, (o.z - o.z_hat).double())


def raw_scores(m: Measured) -> Measured:
    """The MAP_SCORES in place of the maps; without a comparator, not its score."""
    of_maps = {n: score(m.maps[name]) for n, (name, score) in MAP_SCORES.items() if name in m.maps}
    return Measured({}, {**m.scores, **of_maps}, m.gaps)


# Statistics of normal images, and the scores that need them


@dataclass
class Statistics:
    """Fitted on normal images that were not trained on."""

    mean: Tensor  # (latent_dim,) float64, of z - z_hat
    precision: Tensor  # (latent_dim, latent_dim) float64, inverse Ledoit-Wolf covariance
    parts: dict[str, tuple[float, float]]  # score -> mean, standard deviation


def whitened(gaps: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """Squared Mahalanobis distance of z - z_hat, per latent dimension: (N,) float32."""
    centred = gaps - mean
    return ((centred @ precision) * centred).mean(1).float()


def mean_z(values: dict[str, Tensor], statistics: Statistics, names) -> Tensor:
    """Mean of the named scores, or of their maps, each standardised on normal images: float32.

    Scores that the networks do not give are left out.
    """
    parts = {name: statistics.parts[name] for name in names if name in statistics.parts}
    return sum((values[n] - mean) / dev for n, (mean, dev) in parts.items()) / len(parts)


def larger(raw: Measured, statistics: Statistics, small: list[str], large: list[str]) -> Tensor:
    """The larger of two mean_z, of scores for small defects and for large ones: (N,) float32."""
    return mean_z(raw.scores, statistics, small).maximum(mean_z(raw.scores, statistics, large))


FITTED_SCORES = {
    "latent_whitened": lambda raw, fitted: whitened(raw.gaps, fitted.mean, fitted.precision),
    "calibrated": lambda raw, fitted: mean_z(raw.scores, fitted, PARTS),
    "small_or_large": partial(larger, small=["gradient", "comparator"], large=["residual_wide"]),
    "spot_or_area": partial(larger, small=["spot"], large=["area"]),
}
SCORES = (*PLAIN_SCORES, *MAP_SCORES, *FITTED_SCORES)  # all names, in the order of tables


def all_scores(raw: Measured, statistics: Statistics, names=SCORES) -> dict[str, Tensor]:
    """The raw scores and the FITTED_SCORES whose name is in `names`: name -> (N,) float32."""
    fitted = {n: score(raw, statistics) for n, score in FITTED_SCORES.items() if n in names}
    return {**raw.scores, **fitted}


def heat_map(m: Measured, statistics: Statistics) -> Tensor:
    """Anomaly of every pixel (B, S, S): mean of the maps PARTS on the scale of their scores.

    0 is the mean peak of normal images, 1 is one standard deviation above it.
    """
    return mean_z(m.maps, statistics, PARTS)


def fit(raw: Measured) -> Statistics:
    """Statistics of n normal images; a standard deviation is at least 1e-12."""
    from sklearn.covariance import LedoitWolf  # late: slow to import, and predict.py needs none

    fitted = LedoitWolf().fit(raw.gaps.numpy())
    scores = {name: values.double() for name, values in raw.scores.items()}
    return Statistics(
        torch.from_numpy(fitted.location_),
        torch.from_numpy(fitted.precision_),
        {name: (float(s.mean()), max(float(s.std()), 1e-12)) for name, s in scores.items()},
    )


def calibrate(raw: Measured, seed: int) -> tuple[Statistics, dict[str, Tensor]]:
    """Statistics of all n images, and their sorted scores from five folds: name -> (n,) float32.

    Each image is scored with statistics of the other four folds. Without folds there would be far
    more false alarms.
    """

    def subset(images: Tensor) -> Measured:
        return tree_map(lambda values: values[images], raw)

    order = torch.randperm(len(raw.gaps), generator=torch.Generator().manual_seed(seed))
    parts = []
    for fold in order.tensor_split(FOLDS):
        others = order[~torch.isin(order, fold)]
        parts.append(all_scores(subset(fold), fit(subset(others))))
    scores = tree_map(lambda *folds: torch.cat(folds).sort().values, *parts)
    return fit(raw), scores


# Threshold and p-values: split conformal prediction


def threshold_at(normal: Tensor, quantile: float) -> float:
    """The threshold of a quantile; share_above() is the expected share of normal images above it.

    normal: (n,) scores of normal images that neither training nor the statistics have seen. The
    threshold is the score of rank ceil((n + 1) quantile); at most 1 - quantile is expected above
    it. With fewer than quantile / (1 - quantile) images there is no such rank: then it is the
    largest score, and 1 / (n + 1) is expected above it.
    """
    return float(normal.sort().values[rank_at(len(normal), quantile) - 1])


def rank_at(n: int, quantile: float) -> int:
    # Rounded first: (19 + 1) * .95 is 19.000000000000004 in floating point.
    return max(1, min(n, math.ceil(round((n + 1) * quantile, 9))))


def share_above(n: int, quantile: float) -> float:
    """The share of normal images that is expected above the threshold of n images."""
    return 1 - rank_at(n, quantile) / (n + 1)


def p_values(normal: Tensor, scores: Tensor) -> Tensor:
    """Share of normal images that score as high: (N,) float64, at least 1 / (n + 1).

    normal: (n,) as in threshold_at. For any p, at most a share p of normal images has a p-value of
    at most p. A score is above the threshold if and only if its p-value is at most share_above.
    """
    below = torch.searchsorted(normal.sort().values, scores.contiguous())  # strictly below
    return (1 + len(normal) - below).double() / (1 + len(normal))
