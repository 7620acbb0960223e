"""What is found out about a detector on a category's test images: scores.csv, metrics.json."""

from __future__ import annotations

import copy
import sys

import numpy as np
import torch
from torch import Tensor

from ganomaly import metrics
from ganomaly.batches import to_input
from ganomaly.config import Config
from ganomaly.data import Category
from ganomaly.detector import Detector
from ganomaly.files import write_json
from ganomaly.runs.experiment import Run
from ganomaly.runs.results import FIGURES, LOOK_IMAGES

# Images at a time, and at most for the mean image and the PCA: as many as take these bytes in
# float32, but at least so many that every second one suffices for a PCA of 40 components
CONTROL_IMAGES, CONTROL_BYTES, CONTROL_LEAST = 10_000, 2**28, 82


def assess(run: Run, detector: Detector, category: Category, training: dict) -> dict:
    """Score the test images; write scores.csv and metrics.json."""
    labels = category.test_labels
    scores = {name: torch.empty(0) for name in detector.config.scores}
    if len(labels):
        scores = detector.scores(category.test)
    run.write_scores(category, scores)
    if run.board is not None:
        run.write_histograms(labels, scores, detector.calibration.scores)
    row = {
        "category": category.name,
        "dataset": detector.config.dataset,
        "seed": detector.config.seed,
        "score": detector.config.score,
        **figures(detector, category, scores),
        "n_train": len(category.train),
        "n_calibration": len(category.calibration),
        "n_test_good": int((labels == 0).sum()),
        "n_test_defective": int(labels.sum()),
        **training,
    }
    write_json(run.path("metrics.json"), row)
    return row


def figures(detector: Detector, category: Category, scores: dict) -> dict:
    """The evaluated figures, null where there are no test images."""
    config, threshold, labels = detector.config, detector.threshold, category.test_labels
    scale = detector.scale
    if not len(labels):
        figures = dict.fromkeys(FIGURES)
        return {**figures, "threshold": threshold, "scores": dict.fromkeys(scores)}
    fitting = CONTROL_BYTES // (4 * category.test[0].numel())
    some = max(CONTROL_LEAST, min(CONTROL_IMAGES, fitting))
    as_numpy = {name: values.numpy() for name, values in scores.items()}
    each = {name: metrics.auroc(labels, values) for name, values in as_numpy.items()}
    return {
        **metrics.evaluate(labels, as_numpy[config.score], threshold),
        "threshold": threshold,
        **metrics.controls(
            seen(category.train[:: -(-len(category.train) // some)], scale),
            (seen(part, scale) for part in category.test.split(some)),
            labels,
        ),
        "auroc_brightness_raw": metrics.auroc(labels, metrics.brightness(category.test.numpy()))
        if config.normalise != "none"
        else None,
        "pixel_auroc": pixel_auroc(detector, category),
        "scores": each,
    }


def seen(pixels: Tensor, scale: float | None) -> np.ndarray:
    """What a network sees of uint8 images (N, C, S, S), as float32 in [0, 1]."""
    if scale is None:
        return pixels.numpy().astype(np.float32) / 255
    return (to_input(pixels, torch.device("cpu"), scale) / 2 + 0.5).numpy()


def pixel_auroc(detector: Detector, category: Category) -> float | None:
    """AUROC of the heat maps over all test pixels, at the network's size; None without masks."""
    masks = category.test_masks
    if masks is None or not masks.any():
        if masks is not None:
            print(
                f"note: {category.name}: no pixel of any mask is defective at this image size "
                "(masks are 0 and 255), so no figures of pixels",
                file=sys.stderr,
            )
        return None
    histogram = metrics.Histogram()
    for images, mask in zip(category.test.split(detector.batch), masks.split(detector.batch)):
        histogram.add(mask.numpy(), detector.heat_maps(images).numpy())
    return histogram.auroc()


def look(
    config: Config, category: Category, device: torch.device, networks: dict, scale: float | None
) -> dict[str, float]:
    """AUROC of every score in the middle of training, on up to LOOK_IMAGES images of a kind."""
    detector = Detector(copy.deepcopy(networks), config, device, scale)
    detector.calibrate(category.calibration[evenly(len(category.calibration), LOOK_IMAGES)])
    picked = samples_of(category.test_labels, LOOK_IMAGES)
    scores = detector.scores(category.test[picked])
    labels = category.test_labels[picked]
    return {name: metrics.auroc(labels, values.numpy()) for name, values in scores.items()}


def samples_of(labels: np.ndarray, most: int = 8) -> np.ndarray:
    """Indices of up to `most` good and `most` defective images, evenly spread."""
    groups = [np.flatnonzero(labels == label) for label in (0, 1)]
    return np.concatenate([group[evenly(len(group), most)] for group in groups])


def evenly(n: int, most: int) -> np.ndarray:
    """Up to `most` of n indices, evenly spread."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)
