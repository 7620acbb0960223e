"""AUROC against training steps, as one picture in SVG: a panel a category, a line a score.

Looking at a test set while training is allowed, choosing by it is not: the pictures show how much
the figure of a "best epoch" owes to chance.
"""

from __future__ import annotations

import csv
import statistics
from html import escape
from pathlib import Path

PANEL, GAP, COLUMNS = (260, 180), (46, 44), 4
COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#aa8800", "#66ccee", "#aa3377", "#888888", "#ee8866",
    "#44bb99", "#994455",
)  # fmt: skip
STYLE = (
    "text{font:12px sans-serif;fill:#333}.axis{stroke:#8888;fill:none}.seed{opacity:.3}"
    "path{fill:none;stroke-width:1.5}.mean{stroke-width:2}"
    "@media (prefers-color-scheme:dark){text{fill:#ccc}}"
)


def rows_of(path: Path) -> list[dict[str, str]]:
    """A run's curve.csv: a row per look; none where there is no such file, or a damaged one."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row["step"])
            if not all(0 <= float(row[name]) <= 1 for name in row.keys() - {"step"}):
                return []
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        return []
    return rows


def read(path: Path) -> dict[str, dict[int, float]]:
    """A run's curve.csv: score -> {step: AUROC}."""
    rows = rows_of(path)
    names = [name for name in (rows[0] if rows else {}) if name != "step"]
    return {name: {int(row["step"]): float(row[name]) for row in rows} for name in names}


def svg(title: str, runs: dict[str, list[dict[str, dict[int, float]]]]) -> str:
    """The picture of category -> its seeds' curves; a thin line per seed, a thick one for all."""
    names = list(dict.fromkeys(n for curves in runs.values() for curve in curves for n in curve))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    columns = min(COLUMNS, len(runs))
    width = columns * (PANEL[0] + GAP[0]) + 20
    per_row = max(1, width // 150)  # of the legend
    top = 40 + 18 * -(-len(names) // per_row)
    height = top + -(-len(runs) // columns) * (PANEL[1] + GAP[1]) + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>',
        f'<text x="20" y="22" font-weight="bold">{escape(title)}</text>',
    ]
    for i, name in enumerate(names):
        x, y = 20 + i % per_row * 150, 42 + i // per_row * 18
        out.append(f'<path d="M{x} {y - 4}h18" stroke="{colour[name]}" class="mean"/>')
        out.append(f'<text x="{x + 23}" y="{y}">{escape(name)}</text>')
    for i, (category, curves) in enumerate(runs.items()):
        x = 20 + GAP[0] - 10 + i % columns * (PANEL[0] + GAP[0])
        y = top + 20 + i // columns * (PANEL[1] + GAP[1])
        out.append(f'<g transform="translate({x} {y})">{panel(category, curves, colour)}</g>')
    return "\n".join([*out, "</svg>", ""])


def panel(category: str, curves: list[dict], colour: dict[str, str]) -> str:
    w, h = PANEL
    values = [v for curve in curves for points in curve.values() for v in points.values()]
    last = max((s for c in curves for points in c.values() for s in points), default=1)
    low = min([0.5, *(int(v * 10) / 10 for v in values)])

    def path(points: dict[int, float], name: str, kind: str) -> str:
        at = " ".join(
            f"{s / last * w:.1f},{h - (v - low) / (1 - low) * h:.1f}" for s, v in points.items()
        )
        return f'<path d="M{at}" stroke="{colour[name]}" class="{kind}"/>'

    out = [f'<rect width="{w}" height="{h}" class="axis"/>']
    out.append(f'<text x="4" y="-6">{escape(category)}, AUROC by step</text>')
    ticks = [low, (low + 1) / 2, 1.0]
    out += [
        f'<text x="-6" y="{h - (t - low) / (1 - low) * h + 4:.1f}" text-anchor="end">{t:.2f}</text>'
        for t in ticks
    ]
    out += [
        f'<text x="{s / last * w:.1f}" y="{h + 15}" text-anchor="{anchor}">{s}</text>'
        for s, anchor in ((0, "start"), (last // 2, "middle"), (last, "end"))
    ]
    for name in colour:
        seeds = [curve[name] for curve in curves if name in curve]
        if len(seeds) > 1:
            out += [path(points, name, "seed") for points in seeds]
        steps = [s for s in (seeds[0] if seeds else {}) if all(s in points for points in seeds)]
        if steps:
            means = {s: statistics.fmean(points[s] for points in seeds) for s in steps}
            out.append(path(means, name, "mean"))
    return "".join(out)
