import numpy as np
import pytest
from sklearn import metrics as sk

from ganomaly.metrics import Counts, auroc, brightness, controls, evaluate


def drawn(seed: int, n: int = 60, levels: int = 7):
    """Labels of both kinds and scores with many ties."""
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, n)]
    return labels, (rng.integers(0, levels, n + 2) / levels).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_figures_are_their_definitions(seed):
    labels, scores = drawn(seed)
    threshold = float(np.median(scores))
    ours, verdicts = evaluate(labels, scores, threshold), scores > threshold
    hits, alarms = (verdicts & (labels == 1)).sum(), (verdicts & (labels == 0)).sum()
    misses = (~verdicts & (labels == 1)).sum()
    assert ours["precision"] == pytest.approx(hits / (hits + alarms))
    assert ours["recall"] == pytest.approx(hits / (hits + misses))
    assert ours["f1"] == pytest.approx(2 * hits / (2 * hits + alarms + misses))
    assert ours["accuracy"] == pytest.approx(1 - (alarms + misses) / len(labels))
    assert ours["f1_trivial"] == pytest.approx(sk.f1_score(labels, np.ones_like(labels)))
    # AUROC is the chance that a defective image outscores a good one
    bad, good = scores[labels == 1][:, None], scores[labels == 0][None]
    assert ours["auroc"] == pytest.approx(((bad > good) + 0.5 * (bad == good)).mean())
    cuts = [sk.f1_score(labels, scores >= cut) for cut in np.unique(scores)]
    assert ours["f1_max"] == pytest.approx(max(cuts))


@pytest.mark.parametrize("kind", ("apart", "level", "tiny", "far from zero", "ties"))
def test_counted_values_have_the_auroc_of_all(kind):
    rng = np.random.default_rng(0)
    labels = rng.random(50_000) < 0.03
    values = rng.standard_normal(50_000).astype(np.float32)
    if kind != "level":
        values += labels
    scale, offset = {"tiny": (1e-30, 0), "far from zero": (1, -300)}.get(kind, (1, 0))
    values = values * np.float32(scale) + np.float32(offset)
    if kind == "ties":
        values = values.round()
    counts = Counts()
    for part in np.array_split(np.arange(50_000), 7):
        counts.add(labels[part], values[part])
    assert counts.auroc() == pytest.approx(auroc(labels, values), abs=1e-4)
    assert counts.counts.nbytes == 2**26


def test_an_image_at_the_threshold_is_normal_and_no_hit_is_an_f1_of_zero():
    labels, scores = np.array([0, 1]), np.array([0.5, 0.6], np.float32)
    assert evaluate(labels, scores, 0.5)["accuracy"] == 1
    assert evaluate(labels, scores, 1.0)["f1"] == 0


def grey(n, rng, brightness=100.0):
    pixels = brightness + 20 * rng.standard_normal((n, 3, 8, 8))
    return pixels.clip(0, 255).astype(np.uint8)


def test_brightness_control_shows_both_signs():
    rng = np.random.default_rng(0)
    train, good = grey(30, rng), grey(10, rng)
    labels = np.repeat([0, 1], 10)
    for shift, expected in ((60, 1.0), (-60, 0.0)):
        test = np.concatenate([good, grey(10, rng, 100 + shift)])
        assert controls(train, [test[:7], test[7:]], labels)["auroc_brightness"] == expected


def test_mean_distance_and_pca_controls_against_their_formulas():
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
    assert ours["auroc_mean_distance"] == pytest.approx(
        sk.roc_auc_score(labels, ((b - mean) ** 2).sum(1)), abs=1e-9
    )
    _, _, directions = np.linalg.svd(a - mean, full_matrices=False)
    top = directions[:40]
    residual = (b - mean) - (b - mean) @ top.T @ top
    assert ours["auroc_pca"] == pytest.approx(
        sk.roc_auc_score(labels, (residual**2).sum(1)), abs=0.02
    )
    assert ours["auroc_pca"] > 0.9


def test_controls_work_with_fewer_images_than_components():
    rng = np.random.default_rng(2)
    out = controls(grey(10, rng), [grey(8, rng)], np.repeat([0, 1], 4))
    assert all(0 <= value <= 1 for value in out.values())


def test_brightness_counts_tenths_of_a_grey_level_and_no_rounding():
    images = np.full((4, 3, 8, 8), 0.5)
    images[2:] += 1e-6
    assert len(set(brightness(images))) == 1
    images[2:] += 1 / 255
    assert brightness(images).tolist() == [127.5, 127.5, 128.5, 128.5]
    assert brightness((images * 255).astype(np.uint8)).tolist() == [127, 127, 128, 128]
