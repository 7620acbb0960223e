"""Charts of one category as SVG: score histogram, ROC curves, losses by step."""

from __future__ import annotations

import numpy as np

W, H = 320, 180  # of a chart, pixels
BINS = 40


def svg(inside: str, low: str, high: str) -> str:
    """Axes of W x H, the ends of the horizontal one named."""
    return (
        f'<svg viewBox="0 -6 {W} {H + 24}" width="{W}" height="{H + 30}">'
        f'<path class="axis" d="M0 0V{H}H{W}"/>{inside}'
        f'<text x="0" y="{H + 14}">{low}</text>'
        f'<text x="{W}" y="{H + 14}" text-anchor="end">{high}</text></svg>'
    )


def histogram(labels: np.ndarray, scores: np.ndarray, threshold: float) -> str:
    """Shares of good and defective images by score; what lies far out is in the last bar."""
    low = float(min(scores.min(), threshold))
    high = max(float(np.quantile(scores, 0.98)), threshold)
    span = (high - low) or 1.0
    inside = []
    for label, kind in ((0, "good"), (1, "bad")):
        places = np.clip((scores[labels == label] - low) / span * BINS, 0, BINS - 1).astype(int)
        counts = np.bincount(places, minlength=BINS)
        for i in np.flatnonzero(counts):
            h = counts[i] / counts.max() * (H - 4)
            inside.append(
                f'<rect class="{kind}" x="{i * W / BINS:.1f}" y="{H - h:.1f}" '
                f'width="{W / BINS:.1f}" height="{h:.1f}"/>'
            )
    cut = (threshold - low) / span * W
    inside.append(f'<path class="cut" d="M{cut:.1f} 0V{H}"/>')
    return svg("".join(inside), f"{low:.3g}", f"{high:.3g}")


def roc(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.metrics import roc_curve

    false_alarms, found, _ = roc_curve(labels, scores)
    return false_alarms, found


def roc_chart(rocs: list[tuple[np.ndarray, np.ndarray]]) -> str:
    diagonal = f'<path class="axis" d="M0 {H}L{W} 0"/>'
    return svg(diagonal + "".join(line(x, y, "good") for x, y in rocs), "0", "1")


def losses(records: list[dict]) -> str:
    steps = np.array([record["step"] for record in records], float)
    inside = ""
    for name, kind in (("contextual", "good"), ("discriminator", "bad")):
        values = np.log10(np.maximum([record[name] for record in records], 1e-9))
        inside += line(steps / steps[-1], (values - values.min()) / (np.ptp(values) or 1), kind)
    return svg(inside, "0", f"{steps[-1]:.0f}")


def line(x: np.ndarray, y: np.ndarray, kind: str) -> str:
    points = " ".join(f"{a * W:.1f},{(1 - b) * H:.1f}" for a, b in zip(x, y))
    return f'<path class="{kind}" style="fill:none" d="M{points}"/>'
