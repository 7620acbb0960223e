"""benchmark.py and ablate.py: many runs, whatever becomes of some of them, and their tables."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from ganomaly.config import load_config
from ganomaly.runs import pipeline

from .conftest import ROOT, TINY, TINY_FLAGS, benchmark_words, folder_of, load_script
from .outputs import printed, read_csv, read_json, refusal, results_of


def test_missing_categories_are_listed_before_any_work(script, fifteen, tmp_path):
    shutil.copytree(fifteen / "tile", tmp_path / "some/tile")
    words = benchmark_words(tmp_path / "some", tmp_path / "out")
    words += ["--categories", "tile", "wood"]
    line = refusal(script("benchmark", *words, "tils", "--skip-missing"))
    assert "mvtec needs one of" in line and "not tils" in line  # no image of it can ever be there
    words.append("cable")
    assert "(wood, cable)" in refusal(script("benchmark", *words))
    assert not (tmp_path / "out").exists()
    for more, done in (["--dry-run"], "tile/seed42: train"), ([], "tile seed 42: AUROC"):
        code, out, err = script("benchmark", *words, "--skip-missing", *more)
        assert code == 1 and "skipped wood" in err and done in out


@pytest.mark.slow
def test_two_benchmarks_share_the_work_and_the_table(script, fifteen, tmp_path):
    words = ["--categories", "tile", "wood", "--seeds", "1", "2"]
    printed(script("benchmark", *benchmark_words(fifteen, tmp_path / "serial", *words)))
    both = benchmark_words(fifteen, tmp_path / "both", *words)
    command = [sys.executable, ROOT / "scripts/benchmark.py", *both]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert sum(out.count("(done before)") for out, _ in answers) == 4
    serial, shared = (results_of(tmp_path / name / "all") for name in ("serial", "both"))
    assert serial == shared and len(serial) == 6


def test_a_lost_gpu_ends_the_process_and_is_no_failed_run(script, parts, tmp_path, monkeypatch):
    asked = []

    def lost(config, *_):
        asked.append(config.seed)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pipeline, "train", lost)
    words = benchmark_words(parts, tmp_path, "--dataset=folder", "--seeds", "1", "2")
    with pytest.raises(torch.AcceleratorError):
        script("benchmark", *words)
    assert asked == [1]


def ablation_words(parts, tmp_path, *more):
    recipe = tmp_path / "recipe.json"
    values = {"dataset": "folder", **TINY, "corrupted": 0.5, "comparator_width": 3}
    recipe.write_text(json.dumps({**values, "normalise": "exposure", "score": "calibrated"}))
    return ["--config", recipe, "--data-root", parts, "--experiments-dir", tmp_path, *more]


def test_ablations_are_compared_by_seed_where_there_are_test_images(script, parts, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(parts / "parts", root / "parts")
    shutil.copytree(parts / "parts/train", root / "untested/train")
    some = ["--only", "base", "half the steps", "no comparator", "--seeds", 1, 2]
    code, out, _ = script("ablate", *ablation_words(root, tmp_path, *some))
    assert code == 1 and out.count("untested seed 1: nothing to evaluate") == 3
    table = out.partition("# Ablations")[2]
    assert "| half the steps |" in table and "±" in table and "untested" not in table
    folder = tmp_path / "local" / "ablations-recipe"
    rows = read_csv(folder / "results.csv")
    assert [(row["ablation"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("base", "half the steps", "no comparator") for seed in ("1", "2")
    ]
    base = {row["seed"]: float(row["auroc"]) for row in rows if row["ablation"] == "base"}
    for row in rows:
        expected = float(row["auroc"]) - base[row["seed"]]
        assert float(row["difference"]) == pytest.approx(expected, abs=2e-6)
    assert rows[-1]["auroc_comparator"] == "" and rows[0]["auroc_comparator"]
    some = ["--only", "half the steps", "--seeds", 1, 2, "--categories", "parts"]
    table = printed(script("ablate", *ablation_words(root, tmp_path, *some)))
    assert "| base |" in table and "comparator |" not in table.partition("Every score")[0]
    words = ["--only=base", "--seeds=1", "--categories=parts", "--steps=9", "--force"]
    _, out, err = script("ablate", *ablation_words(root, tmp_path, *words))
    assert err.count("another recipe or other images than its base run") == 2
    config = read_json(folder / "half-the-steps/parts/seed1/config.json")
    assert config["steps"] == TINY["steps"] // 2


def test_a_table_that_nothing_was_done_for_is_not_printed(script, parts, tmp_path):
    def tables() -> dict:
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("results.*")}

    words, folder = ablation_words(parts, tmp_path, "--only=base"), tmp_path / "local"
    printed(script("ablate", *words, "--seeds=1"))
    before = tables()
    code, out, err = script("ablate", *words, "--seeds=1", "--steps=9")
    assert code == 1 and out == "" and "steps (6 there, 9 asked)" in err
    assert tables() == before
    # And a printed table is of what was asked for
    printed(script("ablate", *words, "--seeds=2"))
    assert "seeds 1:" in printed(script("ablate", *words, "--seeds=1"))
    assert "seeds 1, 2" in (folder / "ablations-recipe/results.md").read_text()


def test_what_a_recipe_does_not_have_is_not_taken_from_it(script, parts, tmp_path):
    words = ["--data-root", parts, "--experiments-dir", tmp_path, "--recipe=paper", "--dry-run"]
    words += ["--dataset=folder", "--category=parts", "--seed=7", "--amp=bf16"]
    code, out, err = script("ablate", *words)
    # Four that change nothing of the paper's recipe are left out
    assert code == 0 and out.count("parts/seed7: train") == len(out.splitlines())
    assert len(out.splitlines()) == len(load_script("ablate").ABLATIONS) - 4
    same = "images as they are, no test-time augmentation, no comparator"
    assert f"{same}, no corruption, no comparator" in err


def test_every_ablation_changes_the_recipe():
    ablate = load_script("ablate")
    recipe = load_config(ROOT / "experiments/calibrated/config.json")
    configs = [ablate.changed(recipe, changes) for _, changes in ablate.ABLATIONS]
    assert configs[0] == recipe and len(set(configs)) == len(configs)
    assert len({ablate.slug(name) for name, _ in ablate.ABLATIONS}) == len(configs)


def test_a_folder_that_is_the_category_is_taken_by_every_command(script, parts, tmp_path):
    where = ["--data-root", parts / "parts", "--experiments-dir", tmp_path]
    words = ["--dataset=folder", *where]
    assert "parts seed 42: AUROC" in printed(script("benchmark", *words, *TINY_FLAGS))
    printed(script("train", *words, *TINY_FLAGS))
    assert folder_of(tmp_path).is_dir()
    printed(script("evaluate", *words))
    some = ["--only", "base", "no encoder loss", *ablation_words(parts, tmp_path)[:2]]
    assert "| no encoder loss |" in printed(script("ablate", *words, *some))
    printed(script("report", *where))


@pytest.mark.slow
def test_a_committed_row_of_the_digits_is_reproduced(script, tmp_path):
    where = ["--experiments-dir", tmp_path, "--experiment=again"]
    printed(script("benchmark", "--recipe=digits", "--categories=0", *where))
    row = read_csv(tmp_path / "again" / "results.csv")[0]
    committed = read_csv(ROOT / "experiments" / "digits" / "results.csv")[0]
    # Other processors round sums differently
    assert abs(float(row["auroc"]) - float(committed["auroc"])) < 0.02
    assert abs(float(row["auroc_pca"]) - float(committed["auroc_pca"])) < 1e-3
