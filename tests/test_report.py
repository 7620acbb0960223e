"""The page of an experiment, read back as a browser would."""

import base64
import io
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from ganomaly.runs import charts
from ganomaly.runs.pictures import panel

from .conftest import draw_category, train
from .outputs import printed


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.sources, self.text, self.tags = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Two seeds of one category whose name would break a careless page."""
    root, name = tmp_path_factory.mktemp("report"), "a<b>&'\"c|d&#60;&amp;#62;"
    draw_category(root / "images" / name, n_good=8, n_bad=8)
    words = ["--experiment=mine", "--steps=120", "--checkpoint-every=40"]
    for seed in ("--seed=42", "--seed=43"):
        train(root / "images", root / "runs", *words, seed, category=name)
    return root, name


def written(script, root, *more) -> Page:
    words = ["--experiments-dir", root / "runs", "--experiment", "mine", *more]
    printed(script("report", *words))
    return Page((root / "runs" / "mine" / "report.html").read_text(encoding="utf-8"))


def test_a_read_only_experiment_is_reported_elsewhere(script, finished, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(tmp_path / "local")
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path / "linked")
    (tmp_path / "local" / ".lock").unlink(missing_ok=True)
    words = ["--experiments-dir", tmp_path, "--experiment", "linked", "--output"]
    printed(script("report", *words, tmp_path / "page.html"))
    assert not (tmp_path / "local" / ".lock").exists()
    assert "<title>linked<" in (tmp_path / "page.html").read_text()  # not its target's name


def test_the_page_shows_the_errors_and_needs_nothing_else(script, experiment):
    root, name = experiment
    page = written(script, root, "--data-root", root / "images")
    assert all(source.startswith("data:") for source in page.sources) and page.sources
    assert "script" not in page.tags and "link" not in page.tags
    assert page.text.count(name) >= 3  # in two tables and its heading, as text
    pictures = [s for s in page.sources if s.startswith("data:image/jpeg")]
    assert len(pictures) == 12  # six good, six defective
    for picture in pictures:
        content = base64.b64decode(picture.partition(",")[2])
        assert Image.open(io.BytesIO(content)).size == (768, 256)
    assert page.text.count("test/good/") == page.text.count("test/a_bar/") == 6
    assert "git keeps no weights" not in page.text
    texts = "ROC, seeds 42, 43;AUROC at each checkpoint;good: false alarms;true positive rate"
    assert "seed 43" in page.text and all(text in page.text for text in texts.split(";"))


def test_from_what_git_keeps_it_says_what_is_missing(script, experiment, tmp_path):
    root, _ = experiment
    lost = shutil.ignore_patterns("*.pt", "log.jsonl", "events*", "*.png")
    shutil.copytree(root / "runs", tmp_path / "runs", ignore=lost)
    page = written(script, tmp_path)
    assert "git keeps no weights" in page.text and {"svg", "table"} <= {*page.tags}
    assert not [s for s in page.sources if s.startswith("data:image/jpeg")]
    page = written(script, root, "--data-root", tmp_path / "nowhere")
    assert "no images in" in page.text and "git keeps no" not in page.text


def test_a_damaged_folder_is_named_and_injects_nothing(script, experiment, tmp_path):
    root, name = experiment
    shutil.copytree(root / "runs", tmp_path / "runs")
    first, second = sorted((tmp_path / "runs" / "mine" / name).glob("seed*"))
    scores, metrics = first / "scores.csv", first / "metrics.json"
    whole, whole_metrics, evil = scores.read_text(), metrics.read_text(), "<img src=x onerror=y>"
    metrics.write_text(whole_metrics.replace('"latent"', f'"{evil}"'))
    scores.write_text(whole.replace("latent,", f"{evil},", 1))
    page = written(script, tmp_path)
    assert "x" not in page.sources and evil in page.text
    scores.write_text("path,label\n" + whole[20:90])
    (second / "metrics.json").write_text("{")
    page = written(script, tmp_path)
    assert "No charts: could not convert" in page.text
    metrics.write_text(whole_metrics)
    scores.write_text(whole.replace("test/", "../../"))
    page = written(script, tmp_path, "--data-root", root / "images")
    assert "names files outside of the category's folder" in page.text
    scores.unlink()
    assert "No charts: [Errno 2]" in written(script, tmp_path).text


def test_a_browser_opens_it_without_a_word(script, experiment, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    root, name = experiment
    written(script, root, "--data-root", root / "images")
    # The width of a phone: nothing but tables and the curves may be wider, and they scroll
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    probe = tmp_path / "probe.html"
    text = (root / "runs/mine/report.html").read_text(encoding="utf-8")
    probe.write_text(
        text + "<script>addEventListener('load',()=>{const e=document.documentElement,"
        "i=[...document.images];document.title=[e.scrollWidth<=e.clientWidth,"
        "i.every(x=>x.naturalWidth>0),i.length]})</script>"
    )
    done = subprocess.run(
        [browser, *words, "--window-size=390,800", "--dump-dom", f"file://{probe}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert "<title>true,true,12</title>" in done.stdout


@pytest.mark.parametrize("channels", [1, 3])
def test_a_panel_has_a_row_of_images_one_of_reconstructions_and_one_of_differences(channels):
    x, x_hat = torch.full((2, 5, channels, 32, 32), -1.0)
    x_hat[2] = -0.5  # a quarter of the range
    rows = panel(x, x_hat)[:, 1:, 1:].unflatten(2, (5, 33)).unflatten(1, (3, 33))
    for i, row in enumerate(([0] * 5, [0, 0, 0.25, 0, 0], [0, 0, 1, 0, 0])):
        assert rows[:, i, 16, :, 16].tolist() == [row] * 3
    assert (rows[:, :, 32] == 0.5).all() and (rows[..., 32] == 0.5).all()


def lines(picture: str, kind: str) -> list[list[tuple[float, float]]]:
    paths = re.findall(rf'<path [^>]*class="?{kind}"? d="M([^"h]+)"/>', picture)
    return [[tuple(map(float, at.split(","))) for at in path.split()] for path in paths]


def test_charts_show_what_the_numbers_say():
    labels, scores = np.array([0] * 6 + [1] * 4), np.array([0.0] * 6 + [1.0, 1, 1, 0])
    chart = charts.histogram(labels, scores, 0.5, "a<b")
    (good,), (bad,), (cut,) = (lines(chart, kind) for kind in ("good", "bad", "cut"))
    bar, right = charts.W / charts.BINS, charts.W
    top, third, base = 0, pytest.approx(charts.H * 2 / 3, abs=0.1), charts.H
    assert good[:4] == [(0, top), (bar, top), (bar, base), (2 * bar, base)]
    assert bad[:3] == [(0, third), (bar, third), (bar, base)]
    assert bad[-3:] == [(right - bar, base), (right - bar, top), (right, top)]
    assert cut == [(right / 2, base), (right / 2, top)]
    assert ">a&lt;b</text>" in chart
    chart = charts.line_chart([([0, 5], [0.25, 1], "class=x")], "", "xy", 0, 0.25)
    assert lines(chart, "x") == [[(0, charts.H), (charts.W, 0)]]


def test_a_line_a_seed_and_one_of_their_mean():
    seeds = [{"latent": {10: 0.6, 20: 0.8}}, {"latent": {10: 0.8, 20: 1.0}}]
    runs = [{"category": "a<b", "curve": curve} for curve in (*seeds, {})]
    runs.append({"category": "c", "curve": {"latent": {20: 0.5}}})
    picture = charts.curves_svg("try & see", runs)
    root = ET.fromstring(picture)  # names are escaped
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"try & see", "a<b", "step", "AUROC", "latent"} <= set(texts)
    thin, thick = lines(picture, "seed"), lines(picture, "mean")
    assert len(thin) == 2 and len(thick) == 2
    for a, b, mean in zip(*thin, thick[0]):
        assert abs((a[1] + b[1]) / 2 - mean[1]) <= 0.11 and a[0] == b[0] == mean[0]
    assert thick[0][1][1] < thick[0][0][1]  # a better one is higher up
    assert thin[1][1] == (charts.W, 0.0)  # the last step, an AUROC of 1
    # A figure under a half stays inside its panel
    runs = [{"category": "c", "curve": {"a": {1: 0.123, 2: 0.9}}}]
    ((low, high),) = lines(charts.curves_svg("x", runs), "mean")
    assert 0 <= high[1] < low[1] <= charts.H
