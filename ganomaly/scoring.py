"""Raw anomaly scores, their calibration on held-out normal images, and the trained detector.

Networks are in eval mode and float32 here, so that a score depends on neither batch size, batch
mates nor order, and scoring changes no buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ganomaly import config as configuration
from ganomaly.batches import to_input
from ganomaly.config import Config
from ganomaly.errors import UserError
from ganomaly.files import read_torch
from ganomaly.networks import Discriminator, Generator, build

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


# Scores that need to know nothing of other images. `latent` is what the released code computes
# for the paper's eq. 5, `latent_l1` what the paper prints there.
SCORES = {
    "latent": lambda o: (o.z - o.z_hat).square().mean(1),
    "latent_l1": lambda o: (o.z - o.z_hat).abs().mean(1),
    "contextual": lambda o: (o.x - o.x_hat).abs().mean((1, 2, 3)),
    "feature": lambda o: (o.f - o.f_hat).square().mean((1, 2, 3)),
}


@dataclass
class Raw:
    """Scores of N images before any calibration."""

    scores: dict[str, Tensor]  # name -> (N,) float32
    gaps: Tensor  # (N, latent_dim) float64, z - z_hat


@dataclass
class Calibration:
    """What is known of normal images that were not trained on."""

    mean: Tensor  # (latent_dim,) float64, of z - z_hat
    precision: Tensor  # (latent_dim, latent_dim) float64, inverse Ledoit-Wolf covariance
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


def calibrate(raw: Raw, seed: int) -> Calibration:
    """Statistics from all calibration images, scores from five folds.

    Each image's whitened score uses statistics of the other four fifths: fitted and thresholded
    on the same few images, a nominal 5 % of false alarms becomes most of them.
    """
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(raw.gaps), generator=rng)
    out_of_fold = torch.empty(len(order))
    for fold in order.tensor_split(FOLDS):
        others = order[~torch.isin(order, fold)]
        out_of_fold[fold] = whitened(raw.gaps[fold], *fit_whitening(raw.gaps[others]))
    scores = {**raw.scores, "latent_whitened": out_of_fold}
    mean, precision = fit_whitening(raw.gaps)
    return Calibration(mean, precision, {name: s.sort().values for name, s in scores.items()})


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

    generator: Generator
    discriminator: Discriminator
    config: Config
    device: torch.device
    calibration: Calibration | None = None
    threshold: float | None = None  # of the headline score

    def __post_init__(self):
        for network in (self.generator, self.discriminator):
            network.to(self.device, memory_format=torch.channels_last)
            network.eval().requires_grad_(False)

    @torch.inference_mode()
    def outputs(self, pixels: Tensor) -> Outputs:
        """One batch, uint8 (B, C, S, S) -> Outputs."""
        x = to_input(pixels, self.device)
        with torch.autocast(self.device.type, enabled=False):  # whatever a caller has on
            z, x_hat, z_hat = self.generator(x)
            _, f = self.discriminator(x)
            _, f_hat = self.discriminator(x_hat)
        return Outputs(x, x_hat, z, z_hat, f, f_hat)

    def calibrate(self, pixels: Tensor) -> None:
        """Learn from uint8 normal images (n, C, S, S) that were not trained on."""
        self.calibration = calibrate(self.raw(pixels), self.config.seed)
        normal = self.calibration.scores[self.config.score]
        self.threshold, _ = threshold_at(normal, self.config.quantile)

    def raw(self, pixels: Tensor) -> Raw:
        """All uncalibrated scores of uint8 images (N, C, S, S), one pass.

        UserError where one is not finite, as of a network that diverged.
        """
        scores: dict[str, list[Tensor]] = {name: [] for name in SCORES}
        gaps = []
        batches = pixels.split(BATCH)
        for batch in tqdm(batches, "scoring", leave=False, disable=None, delay=2):
            o = self.outputs(batch)
            for name, function in SCORES.items():
                scores[name].append(function(o).cpu())
            gaps.append((o.z - o.z_hat).double().cpu())
        raw = Raw({name: torch.cat(parts) for name, parts in scores.items()}, torch.cat(gaps))
        for name, values in {**raw.scores, "z - z_hat": raw.gaps}.items():
            if not values.isfinite().all():
                raise UserError(f"{name} is not finite: the training diverged, lower --lr")
        return raw

    def scores(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every anomaly score of uint8 images (N, C, S, S): name -> (N,) float32."""
        raw = self.raw(pixels)
        c = self.calibration
        return {**raw.scores, "latent_whitened": whitened(raw.gaps, c.mean, c.precision)}

    def state(self) -> dict:
        """The content of model.pt: tensors, numbers and text only."""
        return {
            "config": self.config.to_json(),
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "calibration": vars(self.calibration),
            "threshold": self.threshold,
        }


def load_detector(path, device: torch.device) -> Detector:
    """The detector in a model.pt; UserError where the file is not one."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such model; make train writes model.pt files")
    try:
        state = read_torch(Path(path))
        config = configuration.from_json(state["config"])
        generator, discriminator = build(config)
        generator.load_state_dict(state["generator"])
        discriminator.load_state_dict(state["discriminator"])
        calibration, threshold = Calibration(**state["calibration"]), float(state["threshold"])
        whitened(
            torch.zeros(1, config.latent_dim).double(), calibration.mean, calibration.precision
        )
        if calibration.scores.keys() != set(configuration.SCORES):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, UserError):
        raise UserError(
            f"{path}: not a model.pt of this version; name the one in the folder of a finished run"
        ) from None
    return Detector(generator, discriminator, config, device, calibration, threshold)
