"""Figures of one category: AUROC, average precision, F1, AUPRO, and the controls.

Labels are 0 normal, 1 defective; a higher score means more anomalous.
"""

from collections.abc import Iterable

import numpy as np
import sklearn.metrics as sk
from scipy import ndimage
from sklearn.decomposition import PCA


def evaluate(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict:
    """Figures of scores (N,) and of verdicts at a threshold, as experiments/README.md explains."""
    verdicts = scores > threshold
    rates = sk.precision_recall_fscore_support(labels, verdicts, average="binary", zero_division=0)
    names = "true_negative", "false_positive", "false_negative", "true_positive"
    precisions, recalls, _ = sk.precision_recall_curve(labels, scores)
    f1s = 2 * precisions * recalls / np.maximum(precisions + recalls, 1e-12)
    return {
        "auroc": auroc(labels, scores),
        "average_precision": float(sk.average_precision_score(labels, scores)),
        **dict(zip(("precision", "recall", "f1"), map(float, rates))),
        "accuracy": float(sk.accuracy_score(labels, verdicts)),
        "f1_max": float(np.max(f1s)),
        "f1_trivial": float(sk.f1_score(labels, np.ones_like(labels))),
        "confusion": dict(zip(names, sk.confusion_matrix(labels, verdicts).ravel().tolist())),
    }


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(sk.roc_auc_score(labels, scores))


def aupro(masks: np.ndarray, maps: np.ndarray, limit: float = 0.3) -> float:
    """Area under the per-region overlap, as MVTec AD defines it (Bergmann et al., IJCV 2021).

    At a threshold, the overlap is the share of a defective region above it, averaged over all
    regions of all masks. A region is 8-connected. The false-positive rate is the share of good
    pixels above it. The area is taken from a rate of 0 to `limit`, and divided by `limit`.

    masks: bool (N, H, W); maps: (N, H, W), higher is more anomalous.
    """
    neighbours = np.pad(np.ones((1, 3, 3)), ((1, 1), (0, 0), (0, 0)))  # all in the same image
    named, _ = ndimage.label(masks, neighbours)
    share = np.where(masks, 1 / np.bincount(named.ravel())[named], 1)  # of a pixel in its region
    x, y, _ = sk.roc_curve(masks.ravel(), maps.ravel(), sample_weight=share.ravel())
    below, last = x <= limit, np.interp(limit, x, y)
    return float(sk.auc(np.append(x[below], limit), np.append(y[below], last)) / limit)


def found(kinds: list[str], verdicts: np.ndarray) -> dict[str, dict[str, int]]:
    """How many images of each kind but "good" are called defective, and how many there are."""
    groups = {k: verdicts[np.array(kinds) == k] for k in sorted(set(kinds) - {"good"})}
    return {kind: {"found": int(v.sum()), "images": len(v)} for kind, v in groups.items()}


def brightness(images: np.ndarray) -> np.ndarray:
    """Mean brightness of images (N, ...), uint8 or float in [0, 1]: (N,) grey levels.

    Rounded to tenths, because after normalisation only rounding noise would be left to rank.
    """
    means = images.reshape(len(images), -1).mean(axis=1, dtype=np.float64)
    return np.round(means if images.dtype == np.uint8 else 255 * means, 1)


def controls(train: np.ndarray, test: Iterable[np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """AUROC of four simple scores on the pixels that the network sees.

    The scores are mean brightness, the distance to the mean training image, the residual of a PCA
    of the training images with min(40, n - 1) components, and the distance to the nearest training
    image. An AUROC under .5 means that defects have the smaller values.

    train: (n, ...) without the calibration images; test: the parts of (N, ...); both float32.
    """
    train = train.reshape(len(train), -1)
    mean = train.mean(axis=0)
    with np.errstate(invalid="ignore"):  # identical images have no variance to divide by
        pca = PCA(min(40, len(train) - 1, train.shape[1]), random_state=0).fit(train)
    rows = []
    for part in test:
        part = part.reshape(len(part), -1)
        residual = part - pca.inverse_transform(pca.transform(part))
        distance = ((part - mean) ** 2).sum(axis=1)
        _, nearest = sk.pairwise_distances_argmin_min(part, train)
        rows.append(np.stack([brightness(part), distance, (residual**2).sum(axis=1), nearest]))
    values = np.concatenate(rows, axis=1)
    names = ("auroc_brightness", "auroc_mean_distance", "auroc_pca", "auroc_nearest")
    return {name: auroc(labels, scores) for name, scores in zip(names, values)}
