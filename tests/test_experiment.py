"""The tables of an experiment, its recipe, and the files that a run leaves: whole or not there."""

import csv
import errno
import io
import json
import resource
import statistics

import numpy as np
import pytest
import torch

from ganomaly.config import ROOT, Config, load_config
from ganomaly.data import MVTEC
from ganomaly.errors import UserError, describe
from ganomaly.files import read_torch, write_atomic, write_torch
from ganomaly.runs import experiment, pipeline, results
from ganomaly.runs.evaluation import samples_of
from ganomaly.runs.provenance import command
from ganomaly.runs.results import FIGURES, markdown, results_csv, results_page, summary

from .outputs import read_csv


def run_metrics(category, seed=42, auroc=0.5, dataset="mvtec", **changes) -> dict:
    """As read_runs() has it."""
    metrics = {
        "category": category, "dataset": dataset, "seed": seed, "score": "latent",
        **dict.fromkeys(FIGURES, auroc),
        "threshold": 1.0, "scores": {"latent": auroc, "feature": 0.25},
        "n_train": 10, "n_calibration": 10, "n_test_good": 5, "n_test_defective": 5,
        "train_seconds": 1.0, "images_per_second": 9.0,
        "provenance": {"python": "3", "threads": 1, "command": "python scripts/train.py"},
        **changes,
    }  # fmt: skip
    scores = {f"auroc_{name}": value for name, value in metrics["scores"].items()}
    return {**metrics, **scores, **metrics["provenance"], "config": Config(dataset=dataset)}


def write_run(folder, metrics: dict) -> None:
    write_atomic(folder / "config.json", Config(seed=metrics["seed"]).to_json())
    write_atomic(folder / "metrics.json", json.dumps({**metrics, "config": None}))


def rows_of(runs) -> list[dict]:
    return list(csv.DictReader(io.StringIO(results_csv(runs))))


def text_of(runs, **more) -> str:
    return markdown(results_page("x", runs, **more))


def test_means_of_the_fifteen_with_and_without_screw():
    runs = [run_metrics(name, auroc=i / 20) for i, name in enumerate(MVTEC)]
    rows = rows_of(runs)
    assert [row["category"] for row in rows] == [*MVTEC, "Mean", "Mean without screw"]
    values = [i / 20 for i in range(15)]
    assert float(rows[15]["auroc"]) == pytest.approx(statistics.fmean(values))
    del values[MVTEC.index("screw")]
    assert float(rows[16]["auroc"]) == pytest.approx(statistics.fmean(values), abs=1e-5)
    # A mean of the fifteen stands whatever else is there
    more = rows_of([*runs, run_metrics("magnetic_tile", auroc=0.9, dataset="folder")])[16:]
    names = ["Mean", "Mean without screw", "Mean of 16", "Mean of 15 without screw"]
    assert [row["category"] for row in more] == names and more[0] == rows[15]
    # anomalib's mean stands beside a mean of the fifteen, not beside one of fewer
    for some in (runs, runs[1:]):
        assert ("0.421" in text_of(some)) == (some is runs)


def test_the_committed_table_stands_beside_by_category_and_seed_and_no_name_breaks_a_table():
    figures = {("bottle", 1): 0.7, ("bottle", 2): 0.8, ("bottle", 3): 0.9, ("cable", 1): 0.4}
    which = [(c, seed) for seed in (1, 2) for c in ("bottle", "cable", "a|b")]
    runs = [run_metrics(*one, auroc_reference=figures.get(one)) for one in which]
    text = text_of(runs, reference="what it is")
    assert "| category | AUROC | reference | F1 |" in text and "seeds 1, 2;" in text
    for name, reference_cell in (("bottle", "0.750 ± 0.071"), ("cable", "0.400"), ("a\\|b", "")):
        assert f"| {name} | 0.500 ± 0.000 | {reference_cell} | 0.500 ± 0.000 |" in text
    assert "\nwhat it is\n" in text
    assert "it is" not in text_of([run_metrics("pill")], reference="what it is")


def test_a_recipes_committed_table_is_found_by_its_name(tmp_path):
    ours = load_config(ROOT / "experiments/paper/config.json")
    row = read_csv(ROOT / "experiments/paper/results.csv")[0]
    run = run_metrics(row["category"], int(row["seed"]))

    def page(folder, recipe=None) -> str:
        return markdown(experiment.page_of(folder, [{**run}], recipe))

    for name, recipe in (("local/paper", None), ("mine", "paper")):
        folder = tmp_path / name
        for changes, other in (
            ({"steps": 7}, ", made with another config: steps (3000 there, 7 asked)"),
            ({"amp": "fp32"}, ", made with another config: amp (bf16 there, fp32 asked)"),
            ({"amp": "bf16"}, ""),
        ):
            experiment.write_recipe(folder, ours.replace(category="bottle", **changes), force=True)
            text = page(folder, recipe)
            assert f"same category and seed in experiments/paper{other}.\n" in text
            assert f"| {row['category']} | 0.500 | {float(row['auroc']):.3f} | 0.500 |" in text
    for folder in (tmp_path / "mine", ROOT / "experiments/paper", tmp_path / "no-such/paper"):
        assert "reference" not in page(folder)


def test_a_recipe_may_leave_the_precision_to_the_machine(tmp_path):
    setting, digits = pipeline.Setting(None, torch.device("cpu")), Config(dataset="digits")
    experiment.write_recipe(tmp_path, digits, force=False)
    for amp in ("bf16", "fp32"):
        pipeline.run_of(digits.replace(amp=amp, category="7", seed=7), tmp_path, setting)
    line = r"config.json is of another config: steps \(3000 there, 7 asked\); "
    with pytest.raises(UserError, match=line):
        pipeline.run_of(digits.replace(amp="fp32", category="7", steps=7), tmp_path, setting)


def test_runs_of_several_configs_or_of_other_test_images_have_no_mean_and_a_row_each():
    runs = [run_metrics("bottle", seed, provenance={"test_images": seed}) for seed in (1, 2)]
    assert results.one_recipe([runs[0]] * 2) and not results.one_recipe(runs)
    mixed = [run_metrics("3", 1, dataset="digits"), run_metrics("3", 2, dataset="mnist")]
    assert len(rows_of(mixed)) == 2
    text = text_of(mixed)
    assert "| 3 (digits, seed 1) |" in text and "| 3 (mnist, seed 2) |" in text and "±" in text
    assert "Mean" not in text and "0.500 ±" not in text


def test_the_summary_tells_what_was_found_and_what_does_better():
    kinds = {"chip": {"found": 1, "images": 2}, "{dirt}": {"found": 2, "images": 3}}
    more = dict(confusion={"true_positive": 3, "false_positive": 1}, found=kinds)
    text = summary(run_metrics("pills", auroc=0.9537, auroc_pca=0.9834, **more), 0.95)
    assert text.startswith("pills seed 42: AUROC 0.954 (latent), average precision 0.954\n")
    assert "found 3 of 5 defective, false alarms 1 of 5 good\n" in text
    assert "by kind   chip 1 of 2, {dirt} 2 of 3\n" in text
    assert "better here: PCA-40 0.983, this score 0.954" in text
    del kinds["chip"]
    text = summary(run_metrics("pills", auroc=0.9537, auroc_pca=0.9538, **more), 0.95)
    assert "better" not in text and "by kind" not in text


def test_false_alarms_that_cannot_be_promised_are_told():
    text = "expected false alarms 4.8 % (from 20 held-out images)"
    assert results.promise(20, 0.95) == text
    assert results.promise(20, 0.99) == f"{text}; 1 % was asked for, which needs 99 images"
    for quantile, needed in ((0.95, 19), (0.9, 9), (0.99, 99), (0.999, 999), (2 / 3, 2)):
        assert "asked" not in results.promise(needed, quantile)
        assert f"needs {needed}" in results.promise(needed - 1, quantile)


@pytest.mark.parametrize("text", ("", "[]", '{"seed": 1}', "[" * 100_000), ids=range(4))
def test_edited_metrics_are_refused_by_name_and_cost_the_other_runs_nothing(tmp_path, capsys, text):
    for category in ("bottle", "cable"):
        write_run(tmp_path / category / "seed42", run_metrics(category))
    experiment.write_results(tmp_path)
    assert "| bottle |" in (tmp_path / "results.md").read_text() and not capsys.readouterr().err
    path = tmp_path / "bottle" / "seed42" / "metrics.json"
    path.write_text(text)
    experiment.write_results(tmp_path)
    assert f"{path}: not a complete metrics.json" in capsys.readouterr().err
    table = (tmp_path / "results.md").read_text()
    assert "| cable |" in table and "bottle" not in table


def test_a_copy_of_a_run_is_no_second_run(tmp_path, capsys):
    for name in ("bottle/seed42", "bottle/seed42.old", "bottle-old/seed42"):
        write_run(tmp_path / name, run_metrics("bottle"))
    write_run(tmp_path / "cable/seed42", run_metrics("cable"))
    (tmp_path / "cable/seed42/config.json").unlink()
    experiment.write_results(tmp_path)
    err = capsys.readouterr().err
    assert err.count("a copy, of bottle seed 42") == 2 and "seed42.old" in err
    assert "cable/seed42: its config.json is gone" in err
    assert (tmp_path / "results.csv").read_text().count("bottle,42") == 1


def test_a_damaged_curve_is_no_curve(tmp_path):
    write_run(tmp_path / "bottle" / "seed42", run_metrics("bottle"))
    for text in ("", "1", "1,x\n", "1,.5,.6\n", "1,.5\n"):
        (tmp_path / "bottle/seed42/curve.csv").write_text(f"step,latent\n{text}")
        experiment.write_results(tmp_path)
        assert (tmp_path / "curves.svg").exists() == (text == "1,.5\n")


def test_a_recorded_command_has_no_path_of_the_machine():
    words = "/home/x/scripts/train.py --data-root /home/x/images --seed 42".split()
    assert command(words) == "python scripts/train.py --data-root DATA_ROOT --seed 42"
    words = "scripts/train.py --data-root=../images --config /a/b/c.json --lr=1e-3".split()
    expected = "python scripts/train.py --data-root=DATA_ROOT --config c.json --lr=1e-3"
    assert command(words) == expected


def test_samples_are_spread_and_of_both_kinds():
    picked = samples_of(np.array([1] * 30 + [0] * 3)).tolist()
    assert picked[:4] == [30, 31, 32, 0] and len(picked) == 11 and picked[-1] == 29


def test_a_checkpoint_for_which_the_disk_is_too_small_leaves_the_old_one(tmp_path):
    path = tmp_path / "last.pt"
    write_torch(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(OSError) as error:
            write_torch(path, {"weights": [torch.zeros(100_000) for _ in range(9)]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and str(path) in describe(error.value)
    assert read_torch(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]
