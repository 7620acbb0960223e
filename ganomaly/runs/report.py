"""One self-contained HTML page of an experiment: no server, no network, no script.

It is made of the files that git keeps: the tables, and for each category the scores of good and
defective images and the ROC curves. Where a run's model and images are at hand, it also shows the
images on which the run errs most. The page says what was not at hand.
"""

import base64
import contextlib
import csv
from html import escape
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_curve
from torch import Tensor

from ganomaly import data
from ganomaly.detector import Detector, load_detector
from ganomaly.device import use_threads
from ganomaly.errors import UserError
from ganomaly.images import read_images
from ganomaly.runs import charts, pictures
from ganomaly.runs.experiment import page_of, read_runs
from ganomaly.runs.results import Page, verdicts_of

ERRORS = 6  # images of each kind
HEAD = """<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width,initial-scale=1"><style>
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:76rem;padding:0 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #8888;white-space:nowrap}
th{white-space:normal;vertical-align:bottom;min-width:4rem}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:Canvas}
figure{margin:0;max-width:100%}figcaption{font-size:13px;overflow-wrap:anywhere}
svg{max-width:100%;height:auto}.wide svg{max-width:max(100%,640px)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1rem}
.pictures img{width:100%}
</style>"""
HEAT = (
    "Each picture shows the image, its reconstruction, and the image under a heat map. No colour "
    "means no more anomalous than the peaks of good images. Yellow to red is more anomalous. The "
    "verdict comes from the score: a normal image can have colour, a defective one always does."
)


def report_page(folder: Path, data_root: Path | None, device: torch.device) -> str:
    runs = read_runs(folder)
    out = [HEAD, *blocks(page_of(folder, runs))]
    if any(run["curve"] for run in runs):
        out.append("<h2>While training</h2><p>AUROC at each checkpoint; nothing was chosen by it.")
        out.append(f"<div class=wide>{charts.curves_svg(folder.name, runs)}</div>")
    evaluated = [run for run in runs if run["auroc"] is not None]
    for category in dict.fromkeys(run["category"] for run in evaluated):
        seeds = [run for run in evaluated if run["category"] == category]
        called = [{"called defective": f"seed {m['seed']}", **verdicts_of(m)} for m in seeds]
        kinds = list(dict.fromkeys(kind for row in called for kind in row))
        rows = [[row.get(kind, "") for kind in kinds] for row in called]
        out.append(f"<h2>{escape(category)}</h2>{html_table(kinds, rows)}")
        try:
            out += section(seeds, data_root, device)
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            out.append(f"<p>No charts: {escape(str(error))}; make evaluate writes scores.csv.")
    return "\n".join(out) + "\n"


def blocks(page: Page) -> list[str]:
    heading = escape(page[0])
    texts = [f"<p>{escape(b)}" if isinstance(b, str) else html_table(*b) for b in page[1:]]
    return [f"<title>{heading}</title><h1>{heading}</h1>", *texts]


def html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}" for cell in header)
    lines = ["".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    return f"<div class=wide><table>{''.join(f'<tr>{row}' for row in (head, *lines))}</table></div>"


def section(seeds: list[dict], data_root: Path | None, device: torch.device) -> list[str]:
    """A category: histogram and worst images of its first seed, ROC curves of all seeds."""
    m = seeds[0]
    tables = [read_scores(one["folder"], one["score"]) for one in seeds]
    labels, scores, names = tables[0]
    lines = [([0, 1], [0, 1], "class=axis")]
    lines += [(*roc_curve(*each[:2])[:2], "class=good") for each in tables]
    title = f"score {m['score']}, seed {m['seed']}"
    bars = charts.histogram(labels, scores, m["threshold"], title)
    title = f"ROC, seeds {', '.join(str(one['seed']) for one in seeds)}"
    roc = charts.line_chart(lines, title, ("false positive rate", "true positive rate"))
    text = "Test images by score, good (blue) and defective (red), the threshold dashed; ROC curves"
    out = [figure(f"<div class=wide>{charts.svg([bars, roc])}</div>", text)]
    order = np.argsort(scores, kind="stable")
    good = [i for i in order[::-1] if labels[i] == 0][:ERRORS]
    bad = [i for i in order if labels[i] == 1][:ERRORS]
    try:
        shown = explained_images(m, [names[i] for i in good + bad], data_root, device)
    except UserError as error:
        return [*out, f"<p>No pictures of the worst errors: {escape(str(error))}."]
    title = "The good images with the highest scores, the defective ones with the lowest"
    out.append(f"<h3>{title}</h3><p>{HEAT}<div class=pictures>")
    for i, picture in zip(good + bad, shown):
        verdict = "defective" if scores[i] > m["threshold"] else "normal"
        out.append(figure(picture, f"{names[i]}: {scores[i]:.4g}, called {verdict}"))
    return [*out, "</div>"]


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def verdicts_page(detector: Detector, rows: list[list[str]], text: str) -> str:
    """A page of images and verdicts. rows: as in predict's CSV, in the order of the page."""
    out = [HEAD, *blocks(["Verdicts", text])]
    out.append(f"<p>The most anomalous of them, up to {pictures.WORST}. {HEAT}<div class=pictures>")
    for path, score, threshold, verdict, p_value in rows:
        picture = ""
        with contextlib.suppress(UserError):  # the file is gone since
            (picture,) = explained_files(detector, [path])
        caption = f"{path}: {verdict}, score {float(score):.4g} (threshold {float(threshold):.4g}),"
        out.append(figure(picture, f"{caption} p-value {p_value}"))
    return "\n".join([*out, "</div>"]) + "\n"


def explained_files(detector: Detector, files: list) -> list[str]:
    """Pictures of image files, for a page; UserError where one cannot be read."""
    c, white = detector.config, detector.kind.full_scale
    sides = (c.image_size, pictures.SIDE)
    return explain(detector, *(read_images(files, side, c.channels, white)[0] for side in sides))


def explain(detector: Detector, pixels: Tensor, larger: Tensor) -> list[str]:
    """Pictures of uint8 images (N, C, S, S); larger: the same with more pixels, to look at."""
    verdicts, x_hats, heats = detector.explain(pixels)
    drawn = map(pictures.explained, larger, x_hats, heats, verdicts.defective)
    texts = [base64.b64encode(pictures.encoded(one, "jpeg")).decode() for one in drawn]
    start = '<img alt="image, reconstruction, heat map" src="data:image/jpeg;base64,'
    return [f'{start}{text}">' for text in texts]


def explained_images(
    run: dict, names: list[str], data_root: Path | None, device: torch.device
) -> list[str]:
    """Pictures of a finished run's test images; UserError where they cannot be had."""
    if not (run["folder"] / "model.pt").is_file():
        raise UserError("git keeps no weights; make report shows them where the run was made")
    detector = load_detector(run["folder"], device)
    config = detector.config
    use_threads(config.threads)
    if hashes := data.image_hashes(config, data_root):
        if run["provenance"].get("test_images") != hashes["test_images"]:
            raise UserError("its test images changed since; make evaluate scores them again")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise UserError("its scores.csv names files outside of the category's folder")
        folder = data.category_folder(config, data_root)
        return explained_files(detector, [folder / name for name in names])
    category = data.load(config, data_root)
    pixels = category.test[[category.test_paths.index(name) for name in names]]
    return explain(detector, pixels, pixels)


def read_scores(folder: Path, score: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels (N,), scores (N,) and paths of a run's scores.csv."""
    path = folder / "scores.csv"
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    labels, scores = (np.array([float(row[key]) for row in rows]) for key in ("label", score))
    return labels, scores, [row["path"] for row in rows]
