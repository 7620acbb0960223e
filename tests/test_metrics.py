import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sk

from ganomaly.metrics import aupro, brightness, controls, evaluate, found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_their_definitions(seed):
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, 60)]
    scores = (rng.integers(0, 7, 62) / 7).astype(np.float32)  # many ties
    threshold = float(np.median(scores))
    ours, verdicts = evaluate(labels, scores, threshold), scores > threshold
    hits, alarms = (verdicts & (labels == 1)).sum(), (verdicts & (labels == 0)).sum()
    misses = (~verdicts & (labels == 1)).sum()
    assert ours["precision"] == pytest.approx(hits / (hits + alarms))
    assert ours["recall"] == pytest.approx(hits / (hits + misses))
    assert ours["f1"] == pytest.approx(2 * hits / (2 * hits + alarms + misses))
    assert ours["accuracy"] == pytest.approx(1 - (alarms + misses) / len(labels))
    assert (c := ours["confusion"])["true_positive"] == hits and c["false_positive"] == alarms
    assert ours["f1_trivial"] == pytest.approx(2 * labels.sum() / (labels.sum() + len(labels)))
    # AUROC is the chance that a defective image outscores a good one
    bad, good = scores[labels == 1][:, None], scores[labels == 0][None]
    assert ours["auroc"] == pytest.approx(((bad > good) + 0.5 * (bad == good)).mean())
    cuts = [sk.f1_score(labels, scores >= cut) for cut in np.unique(scores)]
    assert ours["f1_max"] == pytest.approx(max(cuts))
    assert evaluate(labels, scores, 9.0)["f1"] == 0


def test_controls_against_their_formulas():
    rng = np.random.default_rng(1)
    # Normal images vary along 5 directions; anomalies leave them.
    basis = rng.standard_normal((5, 192))

    def normal(n):
        pixels = 128 + 15 * rng.standard_normal((n, 5)) @ basis + 3 * rng.standard_normal((n, 192))
        return pixels.clip(0, 255).round().astype(np.uint8).reshape(n, 3, 8, 8)

    train, test = normal(60), np.concatenate([normal(15), normal(15)])
    test[15:, :, 2:4, 2:4] ^= 32
    labels = np.repeat([0, 1], 15)
    ours = controls(train, [test[:7], test[7:]], labels)
    a, b = train.reshape(60, -1) / 255.0, test.reshape(30, -1) / 255.0
    mean = a.mean(0)
    distance = sk.roc_auc_score(labels, ((b - mean) ** 2).sum(1))
    assert ours["auroc_mean_distance"] == pytest.approx(distance, abs=1e-9)
    nearest = ((b[:, None] - a[None]) ** 2).sum(2).min(1)
    assert ours["auroc_nearest"] == pytest.approx(sk.roc_auc_score(labels, nearest), abs=1e-9)
    _, _, directions = np.linalg.svd(a - mean, full_matrices=False)
    top = directions[:40]
    residual = (b - mean) - (b - mean) @ top.T @ top
    pca = sk.roc_auc_score(labels, (residual**2).sum(1))
    assert ours["auroc_pca"] == pytest.approx(pca, abs=0.02) and ours["auroc_pca"] > 0.9


def test_brightness_counts_tenths_of_a_grey_level_and_no_rounding():
    images = np.full((4, 3, 8, 8), 0.5)
    images[2:] += 1e-6
    assert len(set(brightness(images))) == 1
    images[2:] += 1 / 255
    assert brightness(images).tolist() == [127.5, 127.5, 128.5, 128.5]
    assert brightness((images * 255).astype(np.uint8)).tolist() == [127, 127, 128, 128]


@pytest.mark.parametrize("levels", [1, 2, 7, 1000])
def test_aupro_is_its_definition_threshold_by_threshold(levels):
    rng = np.random.default_rng(levels)
    masks = rng.random((5, 9, 8)) < 0.2
    masks[0] = False  # a good image
    maps = (rng.integers(0, levels, masks.shape) + levels * masks // 3).astype(np.float32)
    named = [ndimage.label(mask, np.ones((3, 3))) for mask in masks]
    regions = [(i, names == k + 1) for i, (names, n) in enumerate(named) for k in range(n)]
    points, area = [(0.0, 0.0)], 0.0
    for cut in np.unique(maps)[::-1]:
        above = maps >= cut
        points.append((above[~masks].mean(), np.mean([above[i][r].mean() for i, r in regions])))
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 < min(x1, 0.3):
            width = min(x1, 0.3) - x0
            area += width * (y0 + (y1 - y0) / (x1 - x0) * width / 2)
    assert aupro(masks, maps) == pytest.approx(area / 0.3, abs=1e-12)


def test_what_was_found_is_counted_by_kind():
    counts = found(["b", "a", "good", "b"], np.array([True, False, True, True]))
    assert str(counts) == "{'a': {'found': 0, 'images': 1}, 'b': {'found': 2, 'images': 2}}"
