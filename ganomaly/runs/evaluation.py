"""What the test images say of a detector: scores.csv, metrics.json; a look at it in training."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ganomaly import metrics
from ganomaly.batches import to_input
from ganomaly.config import Config
from ganomaly.data import Category
from ganomaly.detector import Detector
from ganomaly.files import write_atomic, write_json
from ganomaly.runs.results import EMPTY, LOOK_IMAGES, csv_text
from ganomaly.scoring import Outputs

# Limits of the images of one pass and of the PCA's, to save memory. Every k-th image is taken.
# A PCA of 40 components needs 41 images, which are every second one of 82.
CONTROL_IMAGES, CONTROL_BYTES, CONTROL_LEAST = 10_000, 2**28, 82


def assess(detector: Detector, category: Category, training: dict, folder: Path | None) -> dict:
    """Score the test images; returns the metrics. A folder gets scores.csv and metrics.json."""
    labels = category.test_labels
    scores = dict.fromkeys(detector.config.scores, torch.empty(0))
    if len(labels):
        scores = detector.scores(category.test)
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
    if folder:
        columns = [[f"{value:.9g}" for value in values.tolist()] for values in scores.values()]
        rows = zip(category.test_paths, category.test_defects, labels, *columns)
        write_atomic(folder / "scores.csv", csv_text(["path", "defect", "label", *scores], rows))
        write_json(folder / "metrics.json", row)
    return row


def figures(detector: Detector, category: Category, scores: dict) -> dict:
    """The evaluated figures, null where there are no test images."""
    config, threshold, labels = detector.config, detector.threshold, category.test_labels
    nothing = {**EMPTY, "threshold": threshold, "scores": dict.fromkeys(scores)}
    if not len(labels):
        return nothing
    cap = max(CONTROL_LEAST, min(CONTROL_IMAGES, CONTROL_BYTES // (4 * category.test[0].numel())))
    train = category.train[:: -(-len(category.train) // cap)]
    brightness_raw = None
    if config.normalise != "none":
        brightness_raw = metrics.auroc(labels, metrics.brightness(category.test.numpy()))
    arrays = {name: values.numpy() for name, values in scores.items()}
    return {
        **nothing,
        **metrics.evaluate(labels, arrays[config.score], threshold),
        **metrics.controls(
            as_seen_by_network(train, detector.scale),
            (as_seen_by_network(part, detector.scale) for part in category.test.split(cap)),
            labels,
        ),
        "auroc_brightness_raw": brightness_raw,
        "found": metrics.found(category.test_defects, arrays[config.score] > threshold),
        **pixel_figures(detector, category),
        "scores": {name: metrics.auroc(labels, values) for name, values in arrays.items()},
    }


def as_seen_by_network(pixels: Tensor, scale: float | None) -> np.ndarray:
    """uint8 (N, C, S, S) -> float32, in [0, 1] or with the exposure removed as for the network."""
    if scale is None:
        return pixels.numpy().astype(np.float32) / 255
    return (to_input(pixels, torch.device("cpu"), scale) / 2 + 0.5).numpy()


def pixel_figures(detector: Detector, category: Category) -> dict[str, float]:
    """AUROC and AUPRO of the heat maps, at the network's size; empty without defective pixels."""
    masks = category.test_masks
    if masks is None or not masks.any():
        return {}
    masks, heat = masks.numpy(), detector.heat_maps(category.test).numpy()
    auroc = metrics.auroc(masks.ravel(), heat.ravel())
    return {"pixel_auroc": auroc, "aupro": metrics.aupro(masks, heat)}


def look(
    config: Config, category: Category, device: torch.device, networks: dict, scale: float | None
) -> tuple[dict[str, float], Outputs]:
    """Look at networks in the middle of training.

    Returns the AUROC of every score, on up to LOOK_IMAGES test images of a kind, and the outputs of
    up to eight held-out images. Without test images there is no AUROC. Test-time augmentation is
    left out, to save time.
    """
    detector = Detector(networks, config.replace(tta=False), device, scale)
    outputs = detector.outputs(category.calibration[:8])
    if not len(category.test_labels):
        return {}, outputs
    detector.calibrate(category.calibration[evenly(len(category.calibration), LOOK_IMAGES)])
    picked = samples_of(category.test_labels, LOOK_IMAGES)
    scores, labels = detector.scores(category.test[picked]), category.test_labels[picked]
    return {n: metrics.auroc(labels, values.numpy()) for n, values in scores.items()}, outputs


def samples_of(labels: np.ndarray, most: int = 8) -> np.ndarray:
    """Indices of up to `most` good and `most` defective images, evenly spread."""
    groups = [np.flatnonzero(labels == label) for label in (0, 1)]
    return np.concatenate([group[evenly(len(group), most)] for group in groups])


def evenly(n: int, most: int) -> np.ndarray:
    """Up to `most` of n indices, evenly spread."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)
