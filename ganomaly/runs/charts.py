"""Charts of lines in SVG; the picture of AUROC by training step.

Looking at a test set during training is allowed, choosing by it is not. The picture shows how much
the figure of a "best epoch" owes to chance.
"""

import csv
import statistics
from html import escape
from pathlib import Path

import numpy as np

W, H = 280, 180  # of a chart, pixels
LEFT, TOP, RIGHT, BOTTOM = 38, 22, 8, 22  # around it, for text
BINS, COLUMNS = 40, 4
COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#aa8800", "#66ccee", "#aa3377", "#888888", "#ee8866",
    "#44bb99", "#994455", "#8833dd", "#dd3311", "#99bb22", "#cc77dd",
)  # fmt: skip
STYLE = (
    "text{font:12px sans-serif;fill:#333}.axis{stroke:#8888;fill:none}.seed{opacity:.3}"
    "path{fill:none;stroke-width:1.5}.mean{stroke-width:2}.cut{stroke:#888;stroke-dasharray:4 3}"
    ".good{stroke:#2b6cb0}.bad{stroke:#c2410c}"
    "@media (prefers-color-scheme:dark){text{fill:#ccc}}"
)


def svg(charts: list[str], head: str = "", top: int = 0) -> str:
    """A picture of charts in rows, below a head that is `top` pixels high."""
    columns = min(COLUMNS, len(charts))
    width, height = W + LEFT + RIGHT, H + TOP + BOTTOM
    size = columns * width, top + -(-len(charts) // columns) * height
    inside = ""
    for i, chart in enumerate(charts):
        x, y = i % columns * width + LEFT, top + i // columns * height + TOP
        inside += f'<g transform="translate({x} {y})">{chart}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
        f'width="{size[0]}" height="{size[1]}"><style>{STYLE}</style>{head}{inside}</svg>\n'
    )


def line_chart(
    lines: list[tuple], title: str, names: tuple[str, str], left: float = 0.0, low: float = 0.0
) -> str:
    """lines: (x values, y values, attributes of the path); x from left, y from low to 1."""
    right = max((float(max(x)) for x, *_ in lines), default=1)
    span = (right - left) or 1.0
    texts = (
        ('x="4" y="-6"', escape(title)),
        (f'x="0" y="{H + 15}" text-anchor="start"', f"{left:.4g}"),
        (f'x="{W}" y="{H + 15}" text-anchor="end"', f"{right:.4g}"),
        (f'x="-6" y="{H}" text-anchor="end"', f"{low:.2f}"),
        ('x="-6" y="12" text-anchor="end"', "1.00"),
        (f'x="{W // 2}" y="{H + 15}" text-anchor="middle"', names[0]),
        (f'x="{-H // 2}" y="-10" transform="rotate(-90)" text-anchor="middle"', names[1]),
    )
    out = [f'<rect width="{W}" height="{H}" class="axis"/>']
    out += [f"<text {at}>{text}</text>" for at, text in texts]
    for x_values, y_values, attributes in lines:
        at = [
            f"{(x - left) / span * W:.1f},{H - (y - low) / (1 - low) * H:.1f}"
            for x, y in zip(x_values, y_values)
        ]
        out.append(f'<path {attributes} d="M{" ".join(at)}"/>')
    return "".join(out)


def histogram(labels: np.ndarray, scores: np.ndarray, threshold: float, title: str) -> str:
    """Good and defective images by score, as outlines; the last bar has what lies far out."""
    low = float(min(scores.min(), threshold))
    high = max(float(np.quantile(scores, 0.98)), threshold)
    lines = [([threshold, threshold], [0, 1], "class=cut")]
    for label, kind in ((0, "good"), (1, "bad")):
        bars, edges = np.histogram(scores[labels == label].clip(low, high), BINS, (low, high))
        heights = (bars / max(bars.max(), 1)).repeat(2)
        lines.append((edges.repeat(2)[1:-1], heights, f"class={kind}"))
    return line_chart(lines, title, ("score", "share of the highest bar"), left=edges[0])


def read_curve(path: Path) -> dict[str, dict[int, float]]:
    """A run's curve.csv, score -> {step: AUROC}; empty where it is not there, or damaged."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name != "step"] if rows else []
        return {name: {int(row["step"]): float(row[name]) for row in rows} for name in names}
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        return {}


def curves_svg(title: str, runs: list[dict]) -> str:
    """A chart a category; a thin line a score and seed, a thick one for the mean of the seeds."""
    runs = [run for run in runs if run["curve"]]
    names = list(dict.fromkeys(name for run in runs for name in run["curve"]))
    categories = list(dict.fromkeys(run["category"] for run in runs))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    per_row = max(1, min(COLUMNS, len(categories)) * (W + LEFT + RIGHT) // 150)  # of the legend
    head = f'<text x="20" y="22" font-weight="bold">{escape(title)}</text>'
    for i, (name, colour) in enumerate(colours.items()):
        x, y = 20 + i % per_row * 150, 42 + i // per_row * 18
        head += f'<path d="M{x} {y - 4}h18" stroke="{colour}" class="mean"/>'
        head += f'<text x="{x + 23}" y="{y}">{escape(name)}</text>'
    charts = []
    for category in categories:
        curves, lines = [run["curve"] for run in runs if run["category"] == category], []
        for name, colour in colours.items():
            seeds = [curve[name] for curve in curves if name in curve]
            for points in seeds if len(seeds) > 1 else []:
                lines.append((points.keys(), points.values(), f'stroke="{colour}" class="seed"'))
            steps = [s for s in (seeds[0] if seeds else {}) if all(s in points for points in seeds)]
            means = [statistics.fmean(points[step] for points in seeds) for step in steps]
            if steps:
                lines.append((steps, means, f'stroke="{colour}" class="mean"'))
        low = min([0.5, *(int(y * 10) / 10 for _, values, _ in lines for y in values)])
        charts.append(line_chart(lines, category, ("step", "AUROC"), low=low))
    return svg(charts, head, top=40 + 18 * -(-len(names) // per_row))
