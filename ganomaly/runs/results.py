"""Tables of an experiment, from the metrics of its runs; the text of one run for a terminal."""

from __future__ import annotations

import csv
import io
import statistics
from typing import NamedTuple

from ganomaly.data import CLASSES, MVTEC
from ganomaly.runs.published import PUBLISHED
from ganomaly.scoring import rank_at

SOURCE = ("category", "dataset", "seed", "score", "threshold", "scores", "provenance")
FIGURES = (
    "auroc", "average_precision", "f1", "precision", "recall", "accuracy", "f1_max", "f1_trivial",
    "auroc_brightness", "auroc_mean_distance", "auroc_pca", "auroc_brightness_raw", "pixel_auroc",
)  # fmt: skip
ALWAYS = FIGURES[:11]  # of a run that was evaluated
COUNTS = ("n_train", "n_calibration", "n_test_good", "n_test_defective")
TIMES = ("train_seconds", "images_per_second")
METRICS = (*SOURCE, *FIGURES, *COUNTS, *TIMES)  # the keys of metrics.json
ORACLE, REFERENCE = "auroc_best_checkpoint", "auroc_reference"  # of results.md only
LOOK_IMAGES = 1000  # images of a kind that a look at a checkpoint scores
PROVENANCE = ("python", "torch", "device", "cpu", "threads", "commit", "command", "date")


class Reference(NamedTuple):
    """A committed table, to compare with."""

    name: str  # of its experiment
    auroc: dict[tuple[str, int], float]  # by category and seed
    differences: list[str]  # of its config


def flat(metrics: dict) -> dict:
    """One level: scores become auroc_<name>, provenance its keys."""
    scores = {f"auroc_{name}": value for name, value in metrics["scores"].items()}
    return {**metrics, **scores, **metrics["provenance"]}


def score_columns(rows: list[dict]) -> list[str]:
    return [f"auroc_{name}" for name in dict.fromkeys(n for row in rows for n in row["scores"])]


def mean_rows(rows: list[dict]) -> list[dict]:
    """A mean per seed over the evaluated categories, with and without screw.

    `Mean` is over a data set's whole list of categories. Where some of them are missing, or others
    stand beside them, `Mean of k` is over all.
    """
    rows = [row for row in rows if row["auroc"] is not None]
    means = []
    for seed in sorted({row["seed"] for row in rows}):
        of_seed = [row for row in rows if row["seed"] == seed]
        known = CLASSES.get(of_seed[0]["dataset"], MVTEC)
        whole = [row for row in of_seed if row["category"] in known]
        groups = {"Mean": whole} if len(whole) == len(known) else {}
        if not groups or len(of_seed) > len(whole):
            groups[f"Mean of {len(of_seed)}"] = of_seed
        for name, group in groups.items():
            means.append(mean_row(name, group))
            rest = [row for row in group if row["category"] != "screw"]
            if rest and len(rest) < len(group):
                kind = "Mean" if name == "Mean" else f"Mean of {len(rest)}"
                means.append(mean_row(f"{kind} without screw", rest))
    return means


def mean_row(name: str, rows: list[dict]) -> dict:
    keys = [
        key
        for key in (*FIGURES, ORACLE, REFERENCE, *score_columns(rows))
        if all(row.get(key) is not None for row in rows)
    ]
    means = {key: statistics.fmean(row[key] for row in rows) for key in keys}
    first = rows[0]
    same = {key: first[key] for key in ("dataset", "score", "seed", "scores")}
    return {"category": name, **same, **means}


def results_csv(runs: list[dict], alike: bool = True) -> str:
    """A row a run, then the means where the runs are alike; figures to six digits."""
    rows = [flat(run) for run in runs]
    columns = ["category", "seed", "score", "auroc", "average_precision", "threshold"]
    columns += [*FIGURES[2:], *score_columns(rows), *COUNTS, *TIMES, *PROVENANCE]
    means = mean_rows(rows) if alike else []
    cells = [[row.get(column) for column in columns] for row in rows + means]
    return csv_text(
        columns, [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in cells]
    )


def csv_text(header: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def results_md(
    name: str, runs: list[dict], alike: bool = True, best: dict | None = None,
    reference: Reference | None = None,
) -> str:  # fmt: skip
    """The table for people: mean +- standard deviation over seeds, published figures beside.

    Runs that are not alike, of several configs, stand in a row each. best: (category, seed) -> the
    AUROC of a run's best checkpoint. reference: a committed table, whose AUROC of the same category
    and seed stands beside ours.
    """
    rows = []
    for run in runs:
        key = run["category"], run["seed"]
        both = {ORACLE: (best or {}).get(key), REFERENCE: reference and reference.auroc.get(key)}
        rows.append({**flat(run), **both})
    evaluated = [row for row in rows if row["auroc"] is not None]
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    lines = [f"# {name}", ""]
    if len(evaluated) < len(rows):
        left_out = [row["category"] for row in rows if row["auroc"] is None]
        lines += [f"Trained and calibrated, nothing to evaluate: {', '.join(left_out)}.", ""]
    if not evaluated:
        return "\n".join(lines)
    means = mean_rows(rows) if alike else []
    if not alike:
        for row in evaluated:
            row["category"] = f"{row['category']} ({row['dataset']}, seed {row['seed']})"
    shown = evaluated + [
        row for row in means if row["category"].split(" without")[0] != "Mean of 1"
    ]
    published = PUBLISHED.get(evaluated[0]["dataset"], {}) if means else {}
    names = {row["category"] for row in shown}
    published = {title: figures for title, figures in published.items() if names & figures.keys()}
    columns = {
        "AUROC": "auroc",
        "reference": REFERENCE,
        "F1": "f1",
        "F1-max (oracle)": "f1_max",
        "F1, all called defective": "f1_trivial",
        "AUROC of the best checkpoint (oracle)": ORACLE,
        "pixel AUROC": "pixel_auroc",
        "AUROC of brightness": "auroc_brightness",
        "of brightness before normalisation": "auroc_brightness_raw",
        "of distance to the mean image": "auroc_mean_distance",
        "of PCA-40 residual": "auroc_pca",
    }
    columns = {
        title: key for title, key in columns.items() if any(r.get(key) is not None for r in shown)
    }
    lines += [
        f"Score {', '.join(sorted({row['score'] for row in evaluated}))}; seeds {seeds}; mean ± "
        "standard deviation over seeds. F1 is at the threshold that held-out normal images set; "
        "two oracles, which cannot be had without labels, are the best F1 over all thresholds and "
        f"the best AUROC over a run's checkpoints, seen on up to {LOOK_IMAGES:,} images of a kind.",
        "",
        *reference_lines(reference, columns),
        *table({**columns, **{key: None for key in published}}, shown, published),
        "",
        "AUROC of every score of the same networks:",
        "",
        *table({c.removeprefix("auroc_"): c for c in score_columns(evaluated)}, shown, {}),
        "",
    ]
    return "\n".join(lines)


def reference_lines(reference: Reference | None, columns: dict) -> list[str]:
    """What the column `reference` is, where there is one."""
    if reference is None or REFERENCE not in columns.values():
        return []
    other = ", ".join(reference.differences)
    return [
        f"reference: the AUROC of the same category and seed in experiments/{reference.name}"
        + (f", made with another config: {other}." if other else "."),
        "",
    ]


def table(columns: dict, rows: list[dict], published: dict) -> list[str]:
    lines = ["| category | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for category in dict.fromkeys(row["category"] for row in rows):
        cells = []
        for title, key in columns.items():
            if key is None:
                figure = published[title].get(category)
                cells.append("" if figure is None else f"{figure:.3f}")
            else:
                mine = [r.get(key) for r in rows if r["category"] == category]
                values = [value for value in mine if value is not None]
                cells.append(spread(values))
        name = category.replace("|", "\\|")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation; with sign "+", as differences."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{deviation}" if values else ""


def summary(m: dict, quantile: float) -> str:
    """The results row of one run, for a terminal."""
    n = m["n_calibration"]
    head = f"{m['category']} seed {m['seed']}: {m['n_train']} images trained on, {n} to calibrate"
    above = f"{1 - rank_at(n, quantile) / (n + 1):.1%} of good images are expected above it"
    if m["auroc"] is None:
        told = f"threshold {m['threshold']:.6g} of score {m['score']}: {above}"
        return f"{head}\n  {told}\n  there is no test/, so nothing could be evaluated"
    more = {
        "AUROC of pixels": m["pixel_auroc"],
        "of brightness before normalisation": m["auroc_brightness_raw"],
    }
    told = [f"{name} {value:.4f}" for name, value in more.items() if value is not None]
    extra = ["  and       " + ", ".join(told)] if told else []
    others = "  ".join(f"{name} {value:.4f}" for name, value in m["scores"].items())
    return "\n".join(
        (
            f"{head}, {m['n_test_good']} good and {m['n_test_defective']} defective tested",
            f"  AUROC     {m['auroc']:.4f} ({m['score']}), average precision "
            f"{m['average_precision']:.4f}",
            f"  verdicts  F1 {m['f1']:.4f}, precision {m['precision']:.4f}, recall "
            f"{m['recall']:.4f}, accuracy {m['accuracy']:.4f}",
            f"  threshold {m['threshold']:.6g}: {above}",
            f"  beside    F1-max {m['f1_max']:.4f} (an oracle), F1 of calling all defective "
            f"{m['f1_trivial']:.4f}",
            f"  controls  AUROC of brightness {m['auroc_brightness']:.4f}, of distance to the mean "
            f"image {m['auroc_mean_distance']:.4f}, of PCA-40 {m['auroc_pca']:.4f}",
            *extra,
            f"  scores    AUROC {others}",
        )
    )
