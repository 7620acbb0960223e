"""The tables of an experiment, from the metrics of its runs; the text of one run for a terminal."""

import csv
import io
import math
import statistics
import textwrap
from collections.abc import Iterable

from ganomaly.config import Config, differences
from ganomaly.data import CLASSES, MVTEC
from ganomaly.runs.published import PUBLISHED
from ganomaly.scoring import share_above

# The keys of metrics.json
ALWAYS = (  # of a run that was evaluated
    "auroc", "average_precision", "f1", "precision", "recall", "accuracy", "f1_max", "f1_trivial",
    "auroc_brightness", "auroc_mean_distance", "auroc_pca",
)  # fmt: skip
FIGURES = (*ALWAYS, "auroc_brightness_raw", "pixel_auroc", "auroc_nearest", "aupro")
EMPTY = dict.fromkeys((*FIGURES, "confusion", "found"))  # of a run without test images
COUNTS = ("n_train", "n_calibration", "n_test_good", "n_test_defective")
TIMES = ("train_seconds", "images_per_second")
METRICS = {  # an older run may lack what is not ALWAYS there
    "category", "dataset", "score", "seed", "threshold", "scores", "provenance",
    *ALWAYS, *COUNTS, *TIMES,
}  # fmt: skip
PROVENANCE = ("python", "torch", "device", "cpu", "threads", "commit", "command", "date")

ORACLE, REFERENCE = "auroc_best_checkpoint", "auroc_reference"  # of results.md only
LOOK_IMAGES = 1000  # images of a kind that a look at a checkpoint scores
CONTROLS = {
    "AUROC of brightness": "auroc_brightness",
    "of brightness before normalisation": "auroc_brightness_raw",
    "of distance to the mean image": "auroc_mean_distance",
    "of PCA-40 residual": "auroc_pca",
    "of distance to the nearest training image": "auroc_nearest",
}
# The columns of results.md; those without a value are left out
COLUMNS = {
    "AUROC": "auroc",
    "reference": REFERENCE,
    "F1": "f1",
    "F1-max (oracle)": "f1_max",
    "F1, all called defective": "f1_trivial",
    "AUROC of the best checkpoint (oracle)": ORACLE,
    "pixel AUROC": "pixel_auroc",
    "pixel AUPRO (0.3)": "aupro",
    **CONTROLS,
}

Table = tuple[list[str], list[list[str]]]  # header and rows
Page = list[str | Table]  # its heading, then paragraphs and tables


def markdown(page: Page) -> str:
    heading, *blocks = page
    texts = [f"{b}\n" if isinstance(b, str) else markdown_table(*b) for b in blocks]
    return "\n".join([f"# {heading}\n", *texts])


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; a pipe in a cell is escaped."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    texts = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([texts[0], "|---" * len(lines[0]) + "|", *texts[1:], ""])


def csv_text(header: list[str], rows: Iterable[Iterable]) -> str:
    """A table as CSV; floats to six digits."""
    text = io.StringIO()
    cells = ([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows([header, *cells])
    return text.getvalue()


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation; sign "+" is for differences."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{deviation}" if values else ""


def score_columns(rows: Iterable[dict]) -> list[str]:
    return [f"auroc_{name}" for name in dict.fromkeys(n for row in rows for n in row["scores"])]


def recipe_of(config: Config) -> Config:
    """What runs of one recipe have in common."""
    return config.replace(category=None, seed=42)


def one_recipe(runs: list[dict]) -> bool:
    """Whether runs are of one recipe and the same images. If not, as in `local`, have no means."""
    keys = ("category", "train_images", "test_images")
    images = {tuple(run.get(key) for key in keys) for run in runs}
    one_set = len(images) == len({run["category"] for run in runs})
    recipes = [recipe_of(run["config"]) for run in runs]
    return one_set and not any(differences(recipe, recipes[0]) for recipe in recipes)


def mean_rows(rows: list[dict]) -> list[dict]:
    """A mean per seed over the evaluated categories, with and without screw.

    `Mean` is over a data set's whole list of categories. If some are missing, or if there are
    others too, `Mean of k` is over the k that are there. A mean of one row is that row: left out.
    Runs of several recipes have no means.
    """
    means = []
    evaluated = [row for row in rows if row["auroc"] is not None] if one_recipe(rows) else []
    for seed in sorted({row["seed"] for row in evaluated}):
        of_seed = [row for row in evaluated if row["seed"] == seed]
        known = CLASSES.get(of_seed[0]["dataset"], MVTEC)
        whole = [row for row in of_seed if row["category"] in known]
        groups = {"Mean": whole} if len(whole) == len(known) else {}
        if len(of_seed) > (len(whole) if groups else 1):
            groups[f"Mean of {len(of_seed)}"] = of_seed
        for name, group in groups.items():
            means.append(mean_row(name, group))
            rest = [row for row in group if row["category"] != "screw"]
            if 1 < len(rest) < len(group):
                kind = "Mean" if name == "Mean" else f"Mean of {len(rest)}"
                means.append(mean_row(f"{kind} without screw", rest))
    return means


def mean_row(name: str, rows: list[dict]) -> dict:
    """The mean of every figure that all rows have."""
    columns = (*FIGURES, ORACLE, REFERENCE, *score_columns(rows))
    keys = [key for key in columns if all(row.get(key) is not None for row in rows)]
    means = {key: statistics.fmean(row[key] for row in rows) for key in keys}
    same = {key: rows[0][key] for key in ("dataset", "score", "seed", "scores")}
    return {"category": name, **same, **means}


def results_csv(runs: list[dict]) -> str:
    """A row a run; then the means."""
    columns = ["category", "seed", "score", "auroc", "average_precision", "threshold"]
    columns += [k for k in FIGURES[2:] if k != "aupro" or any(run[k] is not None for run in runs)]
    columns += [*score_columns(runs), *COUNTS, *TIMES, *PROVENANCE]
    rows = [*runs, *mean_rows(runs)]
    return csv_text(columns, [[row.get(column) for column in columns] for row in rows])


def results_page(name: str, runs: list[dict], reference: str = "") -> Page:
    """The results for people: mean ± standard deviation over seeds, published figures beside.

    Of several recipes, each run has a row. reference: what REFERENCE is, if runs have it.
    """
    page: Page = [name]
    if untested := ", ".join(run["category"] for run in runs if run["auroc"] is None):
        page.append(f"Trained and calibrated, nothing to evaluate: {untested}.")
    evaluated = [{**run} for run in runs if run["auroc"] is not None]
    if not evaluated:
        return page
    shown, one = evaluated + mean_rows(runs), one_recipe(runs)
    for row in [] if one else evaluated:
        row["category"] = f"{row['category']} ({row['dataset']}, seed {row['seed']})"
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    scores = ", ".join(sorted({row["score"] for row in evaluated}))
    page.append(
        f"Score {scores}; seeds {seeds}; mean ± standard deviation over seeds. F1 is at the "
        "threshold that held-out normal images set; two oracles, which cannot be had without "
        "labels, are the best F1 over all thresholds and the best AUROC over a run's checkpoints, "
        f"seen on up to {LOOK_IMAGES:,} images of a kind, without test-time augmentation."
    )
    columns = {t: k for t, k in COLUMNS.items() if any(row.get(k) is not None for row in shown)}
    if "reference" in columns:
        page.append(reference)
    names = {row["category"] for row in shown}
    published = PUBLISHED.get(evaluated[0]["dataset"], {}) if one else {}
    published = {title: figures for title, figures in published.items() if names & figures.keys()}
    page.append(table(columns, shown, published))
    page.append("AUROC of every score of the same networks:")
    scores = {column.removeprefix("auroc_"): column for column in score_columns(evaluated)}
    return [*page, table(scores, shown, {})]


def table(columns: dict[str, str], rows: list[dict], published: dict[str, dict]) -> Table:
    """A row a category: the spread of its rows' figures, then what others published."""
    lines = []
    for category in dict.fromkeys(row["category"] for row in rows):
        mine = [row for row in rows if row["category"] == category]
        figures = [[r[key] for r in mine if r.get(key) is not None] for key in columns.values()]
        figures += [[other[category]] if category in other else [] for other in published.values()]
        lines.append([category, *map(spread, figures)])
    return ["category", *columns, *published], lines


def verdicts_of(m: dict) -> dict[str, str]:
    """How many test images are called defective, as "n of N"; empty for an older run."""
    if m["confusion"] is None:
        return {}
    return {
        "good: false alarms": f"{m['confusion']['false_positive']} of {m['n_test_good']}",
        "defective: found": f"{m['confusion']['true_positive']} of {m['n_test_defective']}",
        **{kind: f"{n['found']} of {n['images']}" for kind, n in m["found"].items()},
    }


def promise(n: int, quantile: float) -> str:
    """The false alarms to expect with n held-out images, beside those asked for if they differ."""
    share, asked = 100 * share_above(n, quantile), 100 * (1 - quantile)
    text = f"expected false alarms {share:.2g} % (from {n} held-out images)"
    needed = math.ceil(round(quantile / (1 - quantile), 6))
    if n < needed:
        text += f"; {asked:.2g} % was asked for, which needs {needed} images"
    return text


def listed(figures: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None)


def summary(m: dict, quantile: float) -> str:
    """The results of one run, for a terminal."""
    head = "there is no test/, so nothing could be evaluated"
    n = m["n_calibration"]
    lines = {
        "images": f"{m['n_train']} trained on, {n} to calibrate, "
        f"{m['n_test_good']} good and {m['n_test_defective']} defective tested",
        "threshold": f"{m['threshold']:.6g} of {m['score']}: {promise(n, quantile)}",
    }
    if m["auroc"] is not None:
        head = "AUROC {auroc:.3f} ({score}), average precision {average_precision:.3f}".format(**m)
        (_, alarms), (_, hits), *kinds = verdicts_of(m).items()
        simple = {"PCA-40": m["auroc_pca"], "the nearest training image": m["auroc_nearest"]}
        best, most = max(simple.items(), key=lambda item: item[1])
        better = f"a simpler method is better here: {best} {most:.3f}, this score {m['auroc']:.3f}"
        lines |= {
            "verdicts": f"found {hits} defective, false alarms {alarms} good",
            "by kind": ", ".join(map(" ".join, kinds)) if len(kinds) > 1 else "",
            "rates": listed({k: m[k.lower()] for k in ("F1", "precision", "recall", "accuracy")}),
            "reference": f"best possible F1 {m['f1_max']:.3f} (chosen with the labels), "
            f"F1 of calling all defective {m['f1_trivial']:.3f}",
            "pixels": listed({"AUROC": m["pixel_auroc"], "AUPRO": m["aupro"]}),
            "controls": listed({title: m[key] for title, key in CONTROLS.items()}),
            "note": better if round(most, 3) > round(m["auroc"], 3) else "",
            "scores": "AUROC of " + listed(m["scores"]),
        }
    head = f"{m['category']} seed {m['seed']}: {head}"
    wrap = textwrap.TextWrapper(100, subsequent_indent=" " * 12, break_on_hyphens=False)
    return "\n".join([head, *(wrap.fill(f"  {k:<9} {v}") for k, v in lines.items() if v)])
