"""One self-contained HTML page of an experiment: no server, no network, no script.

It is made of the files that git keeps: the tables, and for each category the scores of good and
defective images and the ROC curves. Where a run's model and images are at hand, it also shows the
images on which the run errs most. The page says what was not at hand.
"""

from __future__ import annotations

import base64
import csv
from html import escape
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_curve

from ganomaly import data
from ganomaly.detector import load_detector
from ganomaly.device import use_threads
from ganomaly.errors import UserError
from ganomaly.files import locked, write_output
from ganomaly.images import read_images
from ganomaly.runs import charts, pictures
from ganomaly.runs.experiment import page_of, read_results
from ganomaly.runs.pipeline import check_train_images
from ganomaly.runs.results import Page, Table
from ganomaly.runs.run import read_metrics, run_folder

ERRORS = 6  # images of each kind
STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--dim:#666;--line:#ccc;--paper:#fff;
--good:#2b6cb0;--bad:#c2410c}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--dim:#aaa;--line:#444;--paper:#161616;
--good:#74a9e6;--bad:#f08c4a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:1rem auto;
max-width:76rem;padding:0 1rem}
h2{margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;white-space:normal;vertical-align:bottom;min-width:4rem}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
.charts{display:flex;flex-wrap:wrap;gap:1rem 2rem}figure{margin:0;max-width:100%}
.charts figure{width:320px}.wide img{max-width:max(100%,640px)}
figcaption,.dim{color:var(--dim);font-size:13px}svg{max-width:100%;height:auto}
.charts text{font:11px system-ui,sans-serif;fill:var(--dim)}
.good{fill:var(--good);stroke:var(--good)}.bad{fill:var(--bad);stroke:var(--bad)}
rect.good,rect.bad{stroke:none;opacity:.6}path,path.good,path.bad{fill:none;stroke-width:1.5}
.axis{stroke:var(--line);fill:none}.cut{stroke:var(--ink);stroke-dasharray:4 3}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1rem}
.pictures img{width:100%;border-radius:4px}figcaption{overflow-wrap:anywhere}
.key b{font-weight:600}.key .g{color:var(--good)}.key .b{color:var(--bad)}
"""


def write_report(folder: Path, output: Path, data_root: Path | None, device: torch.device) -> None:
    """Write the page of an experiment; with pictures where models and images are at hand."""
    page = html(folder, data_root, device)
    with locked(folder, wait=True):
        write_output(output, page)


def html(folder: Path, data_root: Path | None, device: torch.device) -> str:
    """The page of an experiment: tables, curves, a section a category, what could not be shown."""
    missing: dict[str, None] = {}  # sentences on what could not be shown; a dict keeps each once
    results = read_results(folder)
    runs = [m for m in results.runs if m["auroc"] is not None]
    origins = {tuple(str(m["provenance"].get(k)) for k in ("command", "commit")) for m in runs}
    out = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>{escape(folder.name)}</title><style>{STYLE}</style>",
        *blocks(page_of(folder, results) if runs else [folder.name, "No evaluated runs."]),
        *(f"<p class=dim><code>{escape(command)}</code>, commit {escape(commit)}"
          for command, commit in sorted(origins)),
    ]  # fmt: skip
    if results.curves:
        picture = charts.curves_svg(folder.name, results.curves).encode()
        out.append(
            "<h2>While training</h2><p>AUROC at each checkpoint; nothing was chosen by it."
            f'<p class=wide><img alt="AUROC by step" src="{inline(picture, "svg+xml")}">'
        )
    for category in dict.fromkeys(m["category"] for m in runs):
        seeds = [m for m in runs if m["category"] == category]
        try:
            out += section(folder, seeds, missing, data_root, device)
        except FileNotFoundError:
            message = f"Charts of {category}: no scores.csv there; make evaluate writes it."
            missing[message] = None
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            message = f"{category}: scores.csv of a run is damaged ({error})"
            missing[f"{message}; make evaluate writes it again."] = None
    if missing:
        out.append(f"<h2>Not shown</h2><p>{'<p>'.join(map(escape, missing))}")
    return "\n".join(out) + "\n"


def blocks(page: Page) -> list[str]:
    """The blocks of a page as HTML."""
    out = [f"<h1>{escape(page[0])}</h1>"]
    for block in page[1:]:
        if isinstance(block, Table):
            head = "".join(f"<th>{escape(cell)}" for cell in block.header)
            rows = ["".join(f"<td>{escape(cell)}" for cell in row) for row in block.rows]
            body = "".join(f"<tr>{row}" for row in (head, *rows))
            out.append(f"<div class=wide><table>{body}</table></div>")
        else:
            out.append(f"<p>{escape(block)}")
    return out


def section(
    folder: Path, seeds: list[dict], missing: dict, data_root: Path | None, device: torch.device
) -> list[str]:
    """A category: charts of its first seed, the ROC curves of all, the images it errs on."""
    m, category = seeds[0], seeds[0]["category"]
    paths = [run_folder(folder, category, one["seed"]) for one in seeds]
    tables = [read_scores(path, one["score"]) for path, one in zip(paths, seeds)]
    labels, scores, names = tables[0]
    mean = np.mean([one["auroc"] for one in seeds])
    lines = [([0, 1], [0, 1], "class=axis")]
    lines += [(*roc_curve(*each[:2])[:2], "class=good") for each in tables]
    title = f"score {m['score']}, seed {m['seed']}"
    drawn = [
        (charts.histogram(labels, scores, m["threshold"], title),
         "Test images by score, <span class=key><b class=g>good</b> and <b class=b>defective</b>"
         "</span>; the threshold dashed"),
        (charts.line_chart(lines, f"ROC, {len(seeds)} seed{'s' * (len(seeds) > 1)}"),
         f"True positive rate by false positive rate; AUROC {mean:.3f}"),
    ]  # fmt: skip
    out = [f"<h2>{escape(category)}</h2><div class=charts>"]
    out += [f"<figure>{charts.svg([c])}<figcaption>{text}</figcaption></figure>"
            for c, text in drawn]  # fmt: skip
    out.append("</div>")
    order = np.argsort(scores, kind="stable")
    good = [i for i in order[::-1] if labels[i] == 0][:ERRORS]
    bad = [i for i in order if labels[i] == 1][:ERRORS]
    try:
        images = explained_images(paths[0], [names[i] for i in good + bad], data_root, device)
    except UserError as error:
        missing[f"The images on which {category} errs: {error}."] = None
        return out
    shown = dict(zip(good + bad, images))
    for title, chosen in (
        (f"The {len(good)} good images with the highest scores", good),
        (f"The {len(bad)} defective images with the lowest scores", bad),
    ):
        out.append(f"<h3>{title}</h3><div class=pictures>")
        for i in chosen:
            verdict = "defective" if scores[i] > m["threshold"] else "normal"
            text = f"{escape(printable(names[i]))}: {scores[i]:.4g}, called {verdict}"
            out.append(
                f'<figure><img alt="image, reconstruction, heat map" src="{inline(shown[i])}">'
                f"<figcaption>{text}</figcaption></figure>"
            )
        out.append("</div>")
    return out


def explained_images(
    run: Path, names: list[str], data_root: Path | None, device: torch.device
) -> list[bytes]:
    """PNG pictures of a finished run's test images; UserError where they cannot be had."""
    if not (run / "model.pt").is_file():
        raise UserError("git keeps no weights; make report shows them where the run was made")
    detector, metrics = load_detector(run / "model.pt", device), read_metrics(run / "metrics.json")
    config = detector.config
    use_threads(config.threads)
    if config.in_folders:
        hashes = data.image_hashes(config, data_root)
        check_train_images(metrics, hashes, config, data_root)
        if metrics["provenance"].get("test_images") != hashes["test_images"]:
            raise UserError("its test images changed since; make evaluate scores them again")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise UserError("its scores.csv names files outside of the category's folder")
        files = [data.category_folder(config, data_root) / name for name in names]
        pixels = read_images(files, config.image_size, config.channels)
        shown = read_images(files, pictures.SIDE, config.channels)
    else:
        category = data.load(config, data_root)
        shown = pixels = category.test[[category.test_paths.index(name) for name in names]]
    parts = zip(shown, detector.reconstructions(pixels), detector.heat_maps(pixels))
    return [pictures.png(pictures.explained(*part)) for part in parts]


def read_scores(run: Path, score: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels (N,), scores (N,) and paths of a run's scores.csv."""
    with open(run / "scores.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    labels, scores = (np.array([float(row[key]) for row in rows]) for key in ("label", score))
    return labels, scores, [row["path"] for row in rows]


def printable(name: str) -> str:
    """A file's name that may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def inline(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
