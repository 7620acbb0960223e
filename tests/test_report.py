"""The page of an experiment, read back as a browser would."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from ganomaly.config import Config
from ganomaly.device import use_device
from ganomaly.runs import charts, pipeline
from ganomaly.runs.pictures import panel

from .conftest import TINY, draw_category

SENTENCE = "git keeps no weights"


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
    root = tmp_path_factory.mktemp("report")
    name = "a<b>&'\"c|d&#60;&amp;#62;"
    draw_category(root / "images" / name, n_good=8, n_bad=8)
    values = {**TINY, "steps": 120, "checkpoint_every": 40}
    device = use_device("cpu")
    for seed in (42, 43):
        config = Config(dataset="folder", category=name, seed=seed, **values)
        setting = pipeline.Setting(root / "images", device)
        pipeline.run_one(config, root / "runs" / "mine", setting)
    return root, name


def written(script, root, *more) -> Page:
    words = ["--experiments-dir", root / "runs", "--experiment", "mine", *more]
    code, out, err = script("report", *words)
    assert code == 0, err
    return Page((root / "runs" / "mine" / "report.html").read_text(encoding="utf-8"))


def test_the_page_shows_the_errors_and_needs_nothing_else(script, experiment):
    root, name = experiment
    page = written(script, root, "--data-root", root / "images")
    assert all(source.startswith("data:") for source in page.sources) and page.sources
    assert "script" not in page.tags and "link" not in page.tags
    assert page.text.count(name) >= 3  # in two tables and its heading, as text
    pictures = [s for s in page.sources if s.startswith("data:image/png")]
    assert len(pictures) == 12  # six good, six defective
    for picture in pictures:
        content = base64.b64decode(picture.partition(",")[2])
        assert Image.open(io.BytesIO(content)).size == (768, 256)
    assert page.text.count("test/good/") == page.text.count("test/a_bar/") == 6
    assert SENTENCE not in page.text and "Losses by step" in page.text
    assert "ROC, 2 seeds" in page.text and "AUROC at each checkpoint" in page.text


def test_from_what_git_keeps_it_says_what_is_missing(script, experiment, tmp_path):
    root, _ = experiment
    lost = shutil.ignore_patterns("*.pt", "log.jsonl", "events*", "*.png")
    shutil.copytree(root / "runs", tmp_path / "runs", ignore=lost)
    page = written(script, tmp_path)
    assert SENTENCE in page.text and "git keeps no logs" in page.text
    assert "svg" in page.tags and "table" in page.tags
    assert not [s for s in page.sources if s.startswith("data:image/png")]
    # Weights, but not the images
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(root / "runs", tmp_path / "runs")
    page = written(script, tmp_path, "--data-root", tmp_path / "nowhere")
    assert "no folder" in page.text and SENTENCE not in page.text


def test_a_damaged_folder_is_told_and_injects_nothing(script, experiment, tmp_path):
    root, name = experiment
    shutil.copytree(root / "runs", tmp_path / "runs")
    first, second = sorted((tmp_path / "runs" / "mine" / name).glob("seed*"))
    text = (first / "metrics.json").read_text().replace('"latent"', '"<img src=x onerror=y>"')
    (first / "metrics.json").write_text(text)
    (first / "scores.csv").write_text(
        (first / "scores.csv").read_text().replace("latent,", "<img src=x onerror=y>,", 1)
    )
    page = written(script, tmp_path)
    assert "x" not in page.sources and "<img src=x onerror=y>" in page.text
    (first / "scores.csv").write_text("path,label\n" + (first / "scores.csv").read_text()[20:90])
    (second / "metrics.json").write_text("{")
    page = written(script, tmp_path)
    assert "gone or damaged" in page.text and "not a complete metrics.json" in page.text
    shutil.copy(root / "runs" / "mine" / name / "seed42" / "metrics.json", first)
    scores = (root / "runs" / "mine" / name / "seed42" / "scores.csv").read_text()
    (first / "scores.csv").write_text(scores.replace("test/", "../../"))
    page = written(script, tmp_path, "--data-root", root / "images")
    assert "names files outside of the category's folder" in page.text
    (first / "scores.csv").unlink()
    assert f"Charts of {name}: no scores.csv there" in written(script, tmp_path).text
    (tmp_path / "runs" / "mine" / "results.md").write_text("")
    written(script, tmp_path)


def test_nothing_to_report_on_is_refused(script, tmp_path):
    code, _, err = script("report", "--experiments-dir", tmp_path)
    assert code == 2 and "no finished run there" in err


def test_charts_show_what_the_numbers_say():
    labels, scores = np.array([0] * 6 + [1] * 4), np.array([0.0] * 6 + [1.0, 1, 1, 0])
    chart = charts.histogram(labels, scores, 0.5, "a<b")
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)".*?height="([\d.]+)"', chart)
    full = f"{charts.H - 4:.1f}"
    third = f"{(charts.H - 4) / 3:.1f}"
    last = f"{charts.W * (1 - 1 / charts.BINS):.1f}"
    assert bars == [("good", "0.0", full), ("bad", "0.0", third), ("bad", last, full)]
    assert f'class="cut" d="M{charts.W / 2:.1f} 0' in chart
    assert ">a&lt;b</text>" in chart
    (line,) = re.findall(r' d="M(.*?)"', charts.line_chart([([0, 5], [0.25, 1], "")], "x", 0.25))
    assert line == f"0.0,{charts.H:.1f} {charts.W:.1f},0.0"


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
    assert "<title>true,true,13</title>" in done.stdout


@pytest.mark.parametrize("n, channels, size", [(1, 3, 32), (8, 3, 64), (5, 1, 32)])
def test_a_panel_is_torchvisions_grid_without_its_import(n, channels, size):
    from torchvision.utils import make_grid

    rng = torch.Generator().manual_seed(0)
    x, x_hat = torch.rand(2, n, channels, size, size, generator=rng) * 2 - 1
    difference = ((x - x_hat).abs().mean(1, keepdim=True) / 0.5).expand_as(x)
    rows = torch.cat([(x + 1) / 2, (x_hat + 1) / 2, difference])
    theirs = make_grid(rows, nrow=n, padding=1, pad_value=0.5).clamp(0, 1)
    assert torch.equal(panel(x, x_hat), theirs)
