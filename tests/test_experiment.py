import csv
import errno
import io
import json
import os
import resource
import statistics

import numpy as np
import pytest
import torch

from ganomaly.config import ROOT, SCORES, Config, load
from ganomaly.data import MVTEC, TEN
from ganomaly.errors import UserError, describe
from ganomaly.files import read_torch, write_atomic, write_torch
from ganomaly.runs import experiment
from ganomaly.runs.evaluation import samples_of
from ganomaly.runs.provenance import command
from ganomaly.runs.published import PUBLISHED
from ganomaly.runs.results import FIGURES, Reference, markdown, results_csv, results_page, summary
from ganomaly.runs.run import kept_lines, read_metrics


def markdown_of(*args, **kwargs) -> str:
    return markdown(results_page(*args, **kwargs))


def run_metrics(category, seed=42, auroc=0.5, dataset="mvtec", **changes) -> dict:
    return {
        "category": category,
        "dataset": dataset,
        "seed": seed,
        "score": "latent",
        **dict.fromkeys(FIGURES, auroc),
        "threshold": 1.0,
        "scores": {"latent": auroc, "feature": 0.25},
        "n_train": 10, "n_calibration": 10, "n_test_good": 5, "n_test_defective": 5,
        "train_seconds": 1.0, "images_per_second": 9.0,
        "provenance": {"python": "3", "threads": 1, "command": "python scripts/train.py, x"},
        **changes,
    }  # fmt: skip


def rows_of(runs) -> list[dict]:
    return list(csv.DictReader(io.StringIO(results_csv(runs))))


def test_means_of_the_fifteen_with_and_without_screw():
    runs = [run_metrics(name, auroc=i / 20) for i, name in enumerate(MVTEC)]
    rows = rows_of(runs)
    assert [row["category"] for row in rows] == [*MVTEC, "Mean", "Mean without screw"]
    values = [i / 20 for i in range(15)]
    assert float(rows[15]["auroc"]) == pytest.approx(statistics.fmean(values))
    del values[MVTEC.index("screw")]
    assert float(rows[16]["auroc"]) == pytest.approx(statistics.fmean(values), abs=1e-5)
    assert float(rows[16]["auroc_feature"]) == 0.25
    assert rows[15]["threshold"] == rows[15]["command"] == ""
    assert rows[0]["command"] == "python scripts/train.py, x"


def test_a_mean_over_fewer_is_named_so_and_stands_beside_no_published_mean():
    runs = [run_metrics(name) for name in ("bottle", "screw")]
    names = [row["category"] for row in rows_of(runs)]
    assert names == ["bottle", "screw", "Mean of 2", "Mean of 1 without screw"]
    assert "0.421" not in markdown_of("x", runs) and "0.251" in markdown_of("x", runs)
    assert "0.421" in markdown_of("x", [run_metrics(name) for name in MVTEC])


def test_a_mean_of_the_fifteen_stands_whatever_else_is_there():
    runs = [run_metrics(name, auroc=0.5) for name in MVTEC]
    runs.append(run_metrics("magnetic_tile", auroc=0.9, dataset="folder"))
    rows = {row["category"]: float(row["auroc"]) for row in rows_of(runs)[16:]}
    names = ["Mean", "Mean without screw", "Mean of 16", "Mean of 15 without screw"]
    assert list(rows) == names and rows["Mean"] == 0.5 and rows["Mean of 16"] == 0.525


def test_the_committed_table_stands_beside_by_category_and_seed():
    figures = {("bottle", 1): 0.7, ("bottle", 2): 0.8, ("bottle", 3): 0.9, ("cable", 1): 0.4}
    reference = Reference("paper", figures, [])
    runs = [run_metrics(c, seed) for seed in (1, 2) for c in ("bottle", "cable", "pill")]
    text = markdown_of("x", runs, reference=reference)
    titles, _, *rows = [x.split(" | ") for x in text.splitlines() if x.startswith("|")][:6]
    beside = {row[0]: row[titles.index("reference")] for row in rows}
    assert beside["| bottle"] == "0.750 ± 0.071" and beside["| cable"] == "0.400"
    assert beside["| pill"] == beside["| Mean of 3"] == ""
    assert "in experiments/paper.\n" in text
    other = markdown_of(
        "x", runs, reference=reference._replace(differences=["lr (1 there, 2 asked)"])
    )
    assert "in experiments/paper, made with another config: lr (1 there, 2 asked).\n" in other
    assert "reference" not in markdown_of("x", [run_metrics("pill")], reference=reference)


def test_a_recipes_committed_table_is_found_by_its_name(tmp_path):
    ours = load(ROOT / "experiments/paper/config.json")
    for name, recipe in (("local/paper", None), ("mine", "paper")):
        folder = tmp_path / name
        experiment.write_recipe(folder, ours.replace(category="bottle", steps=7), force=False)
        found = experiment.reference_of(folder, recipe)
        assert found.name == "paper" and found.differences == ["steps (3000 there, 7 asked)"]
        with open(ROOT / "experiments/paper/results.csv") as file:
            row = next(csv.DictReader(file))
        assert found.auroc[row["category"], int(row["seed"])] == float(row["auroc"])
    assert experiment.reference_of(tmp_path / "mine") is None
    assert experiment.reference_of(ROOT / "experiments/paper") is None
    assert experiment.reference_of(tmp_path / "no-such/paper") is None


def test_mean_rows_of_each_seed_and_of_other_data_sets():
    runs = [run_metrics(c, seed, 0.1 * seed) for seed in (1, 2) for c in ("bottle", "cable")]
    rows = rows_of(runs)
    assert [(r["category"], r["seed"]) for r in rows[4:]] == [
        ("Mean of 2", "1"),
        ("Mean of 2", "2"),
    ]
    digits = [run_metrics(name, dataset="digits") for name in TEN]
    assert rows_of(digits)[-1]["category"] == "Mean"
    assert rows_of(digits[:-1])[-1]["category"] == "Mean of 9"


def test_runs_of_several_configs_have_no_mean_and_a_row_each():
    mixed = [run_metrics("3", 1, dataset="digits"), run_metrics("3", 2, dataset="mnist")]
    assert len(results_csv(mixed, alike=False).splitlines()) == 3
    text = markdown_of("local", mixed, alike=False)
    assert "| 3 (digits, seed 1) |" in text and "| 3 (mnist, seed 2) |" in text and "±" in text
    assert "Mean" not in text and "0.500 ±" not in text


def test_a_name_cannot_break_the_table():
    assert "| pipe\\|x |" in markdown_of("x", [run_metrics("pipe|x")])


def test_markdown_gives_mean_and_deviation_over_seeds():
    runs = [run_metrics("bottle", seed, auroc) for seed, auroc in ((1, 0.7), (2, 0.8), (3, 0.9))]
    text = markdown_of("x", runs)
    assert "0.800 ± 0.100" in text and "seeds 1, 2, 3" in text


def test_a_run_without_test_images_is_named_and_no_part_of_a_mean():
    empty = {**run_metrics("parts", dataset="folder"), **dict.fromkeys(FIGURES)}
    empty["scores"] = {"latent": None}
    assert rows_of([empty])[0]["auroc"] == ""
    assert "nothing to evaluate: parts" in markdown_of("x", [empty])
    told = summary({**empty, "n_calibration": 39}, 0.95)
    assert "nothing could be evaluated" in told and "5.0% of good images" in told


def test_published_figures_cover_every_category_and_agree_with_their_stated_means():
    for dataset, columns in PUBLISHED.items():
        for name, figures in columns.items():
            values = [v for category, v in figures.items() if category != "Mean"]
            assert len(values) == (15 if dataset in ("mvtec", "folder") else 10)
            # To a unit of the last digit printed; DRAEM's table is rounded to .1 as the others.
            assert statistics.fmean(values) == pytest.approx(figures["Mean"], abs=0.0011), name


def test_f1_of_anomalib_is_that_of_calling_all_defective():
    counts = {"bottle": (20, 63), "screw": (41, 119), "transistor": (60, 40)}
    for name, (good, bad) in counts.items():
        figure = PUBLISHED["mvtec"]["F1-max, anomalib README"][name]
        assert figure == pytest.approx(2 * bad / (2 * bad + good), abs=0.001)


def test_runs_from_before_a_score_was_added_still_make_a_table():
    newer = run_metrics("cable", scores={"latent": 0.5, "feature": 0.5, "brand_new": 0.9})
    rows = rows_of([run_metrics("bottle"), newer])
    assert [row["auroc_brand_new"] for row in rows] == ["", "0.9", ""]
    assert "brand_new" in markdown_of("x", [run_metrics("bottle"), newer])


def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_atomic(path, "old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for stage in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, stage, full)
            with pytest.raises(OSError) as error:
                write_atomic(path, "new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
        line = describe(error.value)
        assert str(path) in line and "free some space" in line


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


def test_log_goes_on_from_the_checkpoint_and_drops_a_half_written_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 50}\n{"step": 100}\n{"step": 150}\n{"step": 2')
    assert kept_lines(log, 100) == ['{"step": 50}\n', '{"step": 100}\n']


def test_samples_are_spread_and_of_both_kinds():
    labels = np.array([1] * 30 + [0] * 3)
    picked = samples_of(labels)
    assert picked.tolist()[:3] == [30, 31, 32] and len(picked) == 11
    assert picked[3] == 0 and picked[-1] == 29


def test_an_experiment_holds_one_recipe_but_local_any(tmp_path):
    config = Config(category="bottle", steps=10, seed=7)
    for name in ("mine", "local"):
        experiment.write_recipe(tmp_path / name, config, force=False)
    assert load(tmp_path / "mine/config.json") == config.replace(category=None, seed=42)
    assert not (tmp_path / "local").exists()
    other = config.replace(steps=20, category="screw", seed=1, checkpoint_every=3)
    experiment.check_recipe(tmp_path / "local", other)
    with pytest.raises(UserError, match=r"steps \(10 there, 20 asked\)") as error:
        experiment.check_recipe(tmp_path / "mine", other)
    assert "category" not in str(error.value) and "checkpoint" not in str(error.value)
    experiment.check_recipe(tmp_path / "mine", other.replace(steps=10))
    # The same images under another name of the data set are the same recipe, others are not.
    experiment.check_recipe(tmp_path / "mine", other.replace(steps=10, dataset="folder"))
    with pytest.raises(UserError, match="dataset"):
        experiment.check_recipe(tmp_path / "mine", other.replace(steps=10, dataset="cifar10"))
    with pytest.raises(UserError, match="another recipe"):
        experiment.write_recipe(tmp_path / "mine", other, force=False)
    experiment.write_recipe(tmp_path / "mine", other, force=True)
    assert load(tmp_path / "mine/config.json").steps == 20


EDITED = [
    "", "[]", "{}", '{"category": "bottle", "seed": 42}', "3", "[" * 100_000,
    *(json.dumps(run_metrics("bottle", **changes)) for changes in (
        {"auroc": "0.5"}, {"auroc": float("nan")}, {"threshold": None}, {"seed": 1.5},
        {"scores": None}, {"scores": {"latent": "high"}}, {"provenance": []}, {"n_train": None},
        {"provenance": {"date": None}}, {"f1": None},
    )),
    json.dumps(run_metrics("bottle", auroc=0.123)).replace("0.123", "1e999"),
]  # fmt: skip


@pytest.mark.parametrize("text", EDITED, ids=range(len(EDITED)))
def test_edited_metrics_are_refused_by_name_and_cost_the_other_runs_nothing(tmp_path, capsys, text):
    for category in ("bottle", "cable"):
        folder = tmp_path / category / "seed42"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(run_metrics(category)))
        (folder / "config.json").write_text(Config().to_json())
    experiment.write_results(tmp_path)
    assert "| bottle |" in (tmp_path / "results.md").read_text() and not capsys.readouterr().err
    path = tmp_path / "bottle" / "seed42" / "metrics.json"
    path.write_text(text)
    with pytest.raises(UserError, match="metrics.json"):
        read_metrics(path)
    experiment.write_results(tmp_path)
    assert f"{path}: not a complete metrics.json" in capsys.readouterr().err
    table = (tmp_path / "results.md").read_text()
    assert "| cable |" in table and "bottle" not in table


def test_a_copy_of_a_run_is_no_second_run(tmp_path, capsys):
    for name in ("bottle/seed42", "bottle/seed42.old", "bottle-old/seed42"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(run_metrics("bottle")))
        (folder / "config.json").write_text(Config().to_json())
    experiment.write_results(tmp_path)
    err = capsys.readouterr().err
    assert err.count("a copy, of bottle seed 42") == 2 and "seed42.old" in err
    assert (tmp_path / "results.csv").read_text().count("bottle,42") == 1


def test_a_damaged_curve_is_no_curve(tmp_path):
    folder = tmp_path / "bottle" / "seed42"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(run_metrics("bottle")))
    (folder / "config.json").write_text(Config().to_json())
    for text in (
        "step,latent\n1",
        "step,latent\n1,x\n",
        "step,latent\n1,.5,.6\n",
        "a,b\n1,2\n",
        "step,latent\n1,nan\n",
        "step,latent\n1,7\n",
    ):
        (folder / "curve.csv").write_text(text)
        experiment.write_results(tmp_path)
        assert not (tmp_path / "curves.svg").exists()
    (folder / "curve.csv").write_text("step,latent\n1,.5\n")
    experiment.write_results(tmp_path)
    assert (tmp_path / "curves.svg").exists()


def test_the_best_checkpoint_is_no_worse_than_the_last_which_more_images_score(tmp_path):
    folder = tmp_path / "bottle" / "seed42"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(run_metrics("bottle", auroc=0.7)))
    (folder / "config.json").write_text(Config().to_json())
    for seen, best in ((0.6, 0.7), (0.8, 0.8)):
        (folder / "curve.csv").write_text(f"step,latent\n1,{seen}\n2,.5\n")
        experiment.write_results(tmp_path)
        names, _, row = (tmp_path / "results.md").read_text().splitlines()[4:7]
        column = names.split(" | ").index("AUROC of the best checkpoint (oracle)")
        assert float(row.split(" | ")[column]) == best


def test_a_recorded_command_has_no_path_of_the_machine():
    words = ["/home/x/scripts/train.py", "--data-root", "/home/x/images", "--seed", "42"]
    assert command(words) == "python scripts/train.py --data-root DATA_ROOT --seed 42"
    words = ["scripts/train.py", "--data-root=../images", "--config", "/a/b/c.json", "--lr=1e-3"]
    assert command(words) == (
        "python scripts/train.py --data-root=DATA_ROOT --config c.json --lr=1e-3"
    )


def test_the_readme_says_what_the_committed_tables_say():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def values(name, category, column):
        with open(ROOT / "experiments" / name / "results.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["category"] == category]
        return [float(row[column]) for row in rows]

    def short(value):
        return f"{value:.3f}".removeprefix("0")

    def mean(name, category, column):
        return short(statistics.fmean(values(name, category, column)))

    def spread(name, category, column):
        found = values(name, category, column)
        return f"{mean(name, category, column)} ± {short(statistics.stdev(found))}"

    above_pca = {"paper": 0, "calibrated": 0}
    for category in ("bottle", "magnetic_tile", "screw", "solar_cells"):
        cells = [category]
        for name in ("paper", "calibrated"):
            ours, pca = (spread(name, category, "auroc"), mean(name, category, "auroc_pca"))
            cells += [ours, pca]
            above_pca[name] += ours[:4] > pca
        assert f"| {' | '.join(cells)} |" in readme
        assert f"{spread('calibrated', category, 'f1')} on {category}" in readme
    assert f"**{spread('paper', 'bottle', 'auroc')}**" in readme
    assert f"**{spread('calibrated', 'bottle', 'auroc')}**" in readme
    assert above_pca["calibrated"] == 4 and "above it on all four" in readme
    losses = {0: "on all four sets", 1: "on three of the four sets", 2: "on two of the four sets"}
    assert f"loses to a PCA** {losses[above_pca['paper']]}" in readme
    digits = spread("digits", "Mean", "auroc"), mean("digits", "Mean", "auroc_pca")
    assert f"of {digits[0]} (" in readme and f"PCA-40 has {digits[1]}" in readme
    mnist = spread("mnist", "Mean", "auroc"), mean("mnist", "Mean", "auroc_pca")
    assert f"is {mnist[0]} (PCA-40 {mnist[1]})" in readme
    assert (
        f"paper has {short(PUBLISHED['mnist']['AUROC, GANomaly paper, best epoch']['Mean'])}"
        in readme
    )
    table = (ROOT / "experiments/mnist/results.md").read_text(encoding="utf-8")
    names, means = (
        next(x for x in table.splitlines() if x.startswith(f"| {start} |")).split(" | ")
        for start in ("category", "Mean")
    )
    oracle = means[names.index("AUROC of the best checkpoint (oracle)")]
    assert f"would have made {oracle.replace('0.', '.')}" in readme
    with open(ROOT / "experiments/calibrated/results.csv", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    scores = [f"auroc_{name}" for name in SCORES if f"auroc_{name}" in columns]
    best = max(statistics.fmean(values("calibrated", "solar_cells", score)) for score in scores)
    assert f"passes {short(best)}" in readme
    # Ablations: the difference to the base, or from it
    with open(ROOT / "experiments/ablations/results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    base = {(r["category"], r["seed"]): r for r in rows if r["ablation"] == "base"}

    def worth(ablation, score="auroc"):
        mine = [r for r in rows if r["ablation"] == ablation]
        assert len(mine) == 6
        apart = [float(r[score]) - float(base[r["category"], r["seed"]][score]) for r in mine]
        return f"{short(abs(statistics.fmean(apart)))} ± {short(statistics.stdev(apart))}"

    assert f"loses {worth('no adversarial loss')} without the adversarial loss" in readme
    both = worth("no corruption, no comparator"), worth("no contextual loss")
    assert f"{both[0]} without corruption and comparator" in readme
    assert f"{both[1]} without the contextual loss" in readme
    assert f"{worth('images as they are')} with images as they are" in readme
    assert f"gains {worth('no encoder loss')}, where" in readme
    assert f"loses {worth('no encoder loss', 'auroc_latent')} (" in readme
    # False alarms at the threshold
    above, good = 0, 0
    for path in (ROOT / "experiments" / "calibrated").glob("*/seed*/scores.csv"):
        threshold = json.loads(path.with_name("metrics.json").read_text())["threshold"]
        with open(path, encoding="utf-8") as file:
            normal = [float(r["calibrated"]) for r in csv.DictReader(file) if r["label"] == "0"]
        above, good = above + sum(score > threshold for score in normal), good + len(normal)
    told = f"{good:,} good test images of the four sets and three seeds, `calibrated` calls "
    assert f"{told}{100 * above / good:.1f} % defective" in readme
