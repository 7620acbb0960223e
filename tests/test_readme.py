"""README says what the committed tables say."""

import re

from ganomaly.runs import experiment
from ganomaly.runs.results import markdown, results_csv

from .conftest import ROOT, committed, load_script


def test_the_table_of_results_is_up_to_date():
    readme = load_script("readme")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.updated(text) == text, "python scripts/readme.py writes it"
    cell = re.search(r"[\d.]+ ± [\d.]+", readme.table())[0]
    older = text.replace(cell, "0.123")
    assert older != text and readme.updated(older).count(cell) == readme.table().count(cell) == 1


def test_every_file_is_in_the_map():
    page = (ROOT / "ganomaly" / "README.md").read_text(encoding="utf-8")
    text = page.partition("## Where things are")[2]
    for path in [*(ROOT / "ganomaly").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        name = path.stem if path.parent.name == "scripts" else path.name
        assert name.startswith("__") or name in text, path


def test_committed_tables_come_out_of_the_committed_runs():
    for name in ("paper", "calibrated", "digits", "mnist", "ablations/base"):
        folder = ROOT / "experiments" / name
        runs = experiment.read_runs(folder)
        assert results_csv(runs) == (folder / "results.csv").read_text(encoding="utf-8")
        page = markdown(experiment.page_of(folder, runs))
        assert page == (folder / "results.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    for page in committed("*.md"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:\s]+)[^):\s]*\)", text):
            assert (page.parent / link).exists(), (page, link)
