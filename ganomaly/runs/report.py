"""One self-contained HTML page of an experiment: no server, no network, no script.

From the files that git keeps: the tables, and per category the scores of good and defective images,
their ROC curve and the AUROC while training. Where a run's log, weights and images are at hand also
its losses, and the images on which it errs most. What was not at hand is said.
"""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

from ganomaly.runs import charts
from ganomaly.runs.experiment import runs_of

ERRORS = 6  # images of each kind
PIPE = "\\|"  # as a table in Markdown writes a pipe
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
rect.good,rect.bad{stroke:none;opacity:.6}path{fill:none;stroke-width:1.5}
.axis{stroke:var(--line);fill:none}.cut{stroke:var(--ink);stroke-dasharray:4 3}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1rem}
.pictures img{width:100%;border-radius:4px}figcaption{overflow-wrap:anywhere}
.key b{font-weight:600}.key .g{color:var(--good)}.key .b{color:var(--bad)}
"""


def page(folder: Path, explain: Callable) -> str:
    """The page of an experiment's folder.

    explain(run's folder, metrics, paths) gives PNG pictures of test images, by their relative
    paths, or says in a sentence why it cannot.
    """
    missing: dict[str, None] = {}  # sentences
    found = runs_of(folder, lambda error: missing.setdefault(f"{error}."))
    runs = {run: metrics for run, metrics, _ in found if metrics["auroc"] is not None}
    # The runs of make ablate are one folder deeper; its table is here
    deeper = sorted({run.parents[2].name for run in folder.glob("*/*/seed*/metrics.json")})
    table = folder / "results.md"
    text = table.read_text(encoding="utf-8") if table.is_file() and (runs or deeper) else ""
    if deeper and text:
        names = ", ".join(deeper)
        missing[f"The runs: make report takes each part too, this name and /<part>: {names}."] = (
            None
        )
    out = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>{escape(folder.name)}</title><style>{STYLE}</style>",
        from_markdown(text) if text else f"<h1>{escape(folder.name)}</h1><p>No evaluated runs.",
    ]
    origins = [m["provenance"] for m in runs.values()]
    origins = {tuple(str(origin.get(key)) for key in ("command", "commit")) for origin in origins}
    for command, commit in sorted(origins):
        out.append(f"<p class=dim><code>{escape(command)}</code>, commit {escape(commit)}")
    if any(folder.glob("*/seed*/curve.csv")) and (folder / "curves.svg").is_file():
        picture = (folder / "curves.svg").read_bytes()
        out.append(
            f"<h2>While training</h2><p>AUROC at each checkpoint; nothing was chosen by it."
            f'<p class=wide><img alt="AUROC by step" src="{inline(picture, "svg+xml")}">'
        )
    bare = []  # categories without scores
    for category in dict.fromkeys(run.parent for run in runs):
        seeds = {run: m for run, m in runs.items() if run.parent == category}
        try:
            out += section(category.name, seeds, explain, missing)
        except FileNotFoundError:
            bare.append(category.name)
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            names = f"{category.name}: scores.csv or log.jsonl of a run is gone or damaged"
            missing[f"{names} ({error}); make evaluate writes scores.csv again."] = None
    if bare:
        missing[f"Charts of {', '.join(bare)}: no scores.csv there; make evaluate writes it."] = (
            None
        )
    if missing:
        out.append(f"<h2>Not shown</h2><p>{'<p>'.join(map(escape, missing))}")
    return "\n".join(out) + "\n"


def section(category: str, seeds: dict[Path, dict], explain: Callable, missing: dict) -> list[str]:
    """A category: charts of its first seed, the ROC curves of all, the images it errs on."""
    run, m = next(iter(seeds.items()))
    read = [read_scores(each, one["score"]) for each, one in seeds.items()]
    labels, scores, paths = read[0]
    out = [f"<h2>{escape(category)}</h2><div class=charts>"]
    chart = charts.histogram(labels, scores, m["threshold"])
    rocs = charts.roc_chart([charts.roc(*each[:2]) for each in read])
    drawn = [
        (chart, f"Score {escape(m['score'])} of seed {m['seed']}: <span class=key><b class=g>good"
         "</b> and <b class=b>defective</b></span> test images, the threshold dashed"),
        (rocs, f"ROC, {len(read)} seed{'s' * (len(read) > 1)}: true against false alarms; "
         f"AUROC {np.mean([one['auroc'] for one in seeds.values()]):.3f}"),
    ]  # fmt: skip
    if (log := run / "log.jsonl").is_file():
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        if len(records) > 1:
            drawn.append(
                (charts.losses(records), "Losses by step, each on a scale of its own, logarithmic: "
                 "<span class=key><b class=g>contextual</b>, <b class=b>discriminator</b></span>")
            )  # fmt: skip
    else:
        missing["Losses: git keeps no logs; where the runs were made, the report shows them."] = (
            None
        )
    out += [f"<figure>{svg}<figcaption>{told}</figcaption></figure>" for svg, told in drawn]
    out.append("</div>")
    order = np.argsort(scores, kind="stable")
    good = [i for i in order[::-1] if labels[i] == 0][:ERRORS]
    bad = [i for i in order if labels[i] == 1][:ERRORS]
    answer = explain(run, m, [paths[i] for i in good + bad])
    if isinstance(answer, str):
        missing[answer] = None
        return out
    pictures = dict(zip(good + bad, answer))
    for title, chosen in (
        (f"The {len(good)} good images with the highest scores", good),
        (f"The {len(bad)} defective images with the lowest scores", bad),
    ):
        out.append(f"<h3>{title}</h3><div class=pictures>")
        for i in chosen:
            called = "defective" if scores[i] > m["threshold"] else "normal"
            told = f"{escape(shown(paths[i]))}: {scores[i]:.4g}, called {called}"
            out.append(
                f'<figure><img alt="image, reconstruction, heat map" src="{inline(pictures[i])}">'
                f"<figcaption>{told}</figcaption></figure>"
            )
        out.append("</div>")
    return out


def read_scores(run: Path, score: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels (N,), scores (N,) and paths of a run's scores.csv."""
    with open(run / "scores.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    labels, scores = (np.array([float(row[key]) for row in rows]) for key in ("label", score))
    return labels, scores, [row["path"] for row in rows]


def shown(name: str) -> str:
    """A file's name that may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def inline(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def from_markdown(text: str) -> str:
    """Headings, paragraphs and tables of a results.md, as HTML."""
    out: list[str] = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if block.startswith("# "):
            out.append(f"<h1>{escape(lines[0][2:])}</h1>")
        elif block.startswith("|"):
            rows = [x[1:-1] for x in lines if not x.startswith("|---")]
            split = [re.split(r"(?<!\\)\|", row) for row in rows]  # not at an escaped pipe
            cells = [
                "".join(f"<td>{escape(cell.strip().replace(PIPE, '|'), False)}" for cell in row)
                for row in split
            ]
            head = cells[0].replace("<td>", "<th>")
            out.append(
                f"<div class=wide><table><tr>{head}<tr>{'<tr>'.join(cells[1:])}</table></div>"
            )
        else:
            out.append(f"<p>{escape(block)}")
    return "\n".join(out)
