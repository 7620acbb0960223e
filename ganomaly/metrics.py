"""Image-level figures of one category: AUROC, average precision, F1, and the controls.

AUC and average precision are scikit-learn's. Labels are 0 normal, 1 defective; a higher score
means more anomalous.
"""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
)


def evaluate(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """Figures of scores (N,) at a threshold that no test label has touched.

    An image is called defective when its score is greater than the threshold. f1_max is the best
    F1 over all thresholds, an oracle; f1_trivial calls every image defective.
    """
    verdicts = scores > threshold
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, verdicts, average="binary", zero_division=0
    )
    bad, good = int(labels.sum()), int((labels == 0).sum())
    return {
        "auroc": auroc(labels, scores),
        "average_precision": float(average_precision_score(labels, scores)),
        "f1": float(f1),
        "precision": float(precision),
        "recall": float(recall),
        "accuracy": float(accuracy_score(labels, verdicts)),
        "f1_max": f1_max(labels, scores),
        "f1_trivial": 2 * bad / (2 * bad + good),
    }


def f1_max(labels: np.ndarray, scores: np.ndarray) -> float:
    """The best F1 that any threshold reaches on these labels."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(roc_auc_score(labels, scores))


def brightness(images: np.ndarray, labels: np.ndarray) -> float:
    """AUROC of the mean brightness of images (N, ...) in [0, 1]; under .5: defects are darker.

    In tenths of a grey level: where each mean was removed, the rank of the rest would be rounding.
    """
    means = images.reshape(len(images), -1).mean(axis=1, dtype=np.float64)
    return auroc(labels, np.round(255 * means, 1))


def controls(train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUROC of three scores that learn little or nothing, on the pixels that the network sees.

    train (n, ...) without the calibration images, test (N, ...), float32: mean brightness, squared
    distance to the mean training image, and the squared residual of a PCA of the training images
    with min(40, n - 1) components.
    """
    train, test = train.reshape(len(train), -1), test.reshape(len(test), -1)
    distance = ((test - train.mean(axis=0)) ** 2).sum(axis=1)
    with np.errstate(invalid="ignore"):  # of identical images: shares of no variance, not used
        pca = PCA(min(40, len(train) - 1, train.shape[1]), random_state=0).fit(train)
    residual = test - pca.inverse_transform(pca.transform(test))
    return {
        "auroc_brightness": brightness(test, labels),
        "auroc_mean_distance": auroc(labels, distance),
        "auroc_pca": auroc(labels, (residual**2).sum(axis=1)),
    }
