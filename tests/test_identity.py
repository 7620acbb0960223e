"""What a finished run is known by, its images, config and code; --force; its lock; evaluate.py."""

import shutil

import numpy as np
import torch

from ganomaly.files import locked, write_json
from ganomaly.runs import provenance

from .conftest import ROOT, benchmark_words, draw, draw_category, folder_of, train, train_words
from .outputs import contents, numbers, printed, read_csv, read_json, refusal


def test_a_finished_run_is_left_alone_until_forced(script, parts, finished, tmp_path):
    words, before = train_words(parts, tmp_path), contents(finished)
    table = tmp_path / "local/results.csv"
    table.unlink()
    out = printed(script("train", *words, "--checkpoint-every=2"))
    assert out.startswith("done before; --force") and table.is_file()
    assert "steps (6 there, 7 asked)" in refusal(script("train", *words, "--steps=7"))
    with locked(finished):
        for command in ("train", "evaluate"):
            assert "another process is using this folder" in refusal(script(command, *words))
    assert contents(finished) == before
    # Nor is a model of another config scored again, nor does a checkpoint of one go on
    write_json(finished / "config.json", {**read_json(finished / "config.json"), "lr": 0.5})
    assert "model.pt is of another config: lr" in refusal(script("evaluate", *words))
    (finished / "metrics.json").unlink()
    assert "last.pt is of another config: lr" in refusal(script("train", *words, "--lr=0.5"))
    assert "steps (6 there, 7 asked)" in refusal(script("train", *words, "--steps=7"))
    (finished / "config.json").unlink()
    assert "config.json: No such file" in refusal(script("train", *words, "--steps=7"))
    printed(script("train", *words, "--steps=7", "--force"))
    assert read_json(finished / "config.json")["steps"] == 7


def test_a_named_experiment_keeps_its_recipe_until_forced(script, parts, tmp_path):
    words = [*train_words(parts, tmp_path), "--experiment=mine"]
    recipe = tmp_path / "mine/config.json"
    printed(script("train", *words, "--seed=7"))
    saved = read_json(recipe)
    assert (saved["seed"], saved["category"], saved["width"]) == (42, None, 4)
    line = refusal(script("train", *words, "--seed=8", "--width=5"))
    assert "width (4 there, 5 asked)" in line and "ARGS=--force" in line
    printed(script("train", *words, "--seed=7", "--width=5", "--force"))
    assert read_json(recipe)["width"] == 5
    printed(script("train", *words, "--seed=8", "--width=5"))
    printed(script("train", *words, "--seed=7", "--width=6", "--force"))  # seed 8 stays as it was
    rows = read_csv(tmp_path / "mine/results.csv")
    assert [row["category"] for row in rows] == ["parts", "parts"]  # and there are no means
    both = ["--dataset=folder", *benchmark_words(parts, tmp_path, "--experiment=mine")]
    both += ["--width=6", "--seeds", 7, 8]
    code, out, err = script("benchmark", *both)
    assert code == 1 and "failed parts seed 8: " in err and "width (5 there, 6 asked)" in err
    assert "done before" not in printed(script("benchmark", *both, "--force"))
    assert printed(script("benchmark", *both)).count("(done before)") == 2


def test_images_replaced_in_place_are_other_images(script, tmp_path):
    parts = draw_category(tmp_path / "images/parts", suffix="bmp")  # uncompressed: of equal sizes
    words, page = train_words(tmp_path / "images", tmp_path), tmp_path / "local/report.html"
    report = ["report", "--experiments-dir", tmp_path, "--data-root", tmp_path / "images"]
    printed(script("train", *words))
    printed(script(*report))
    assert "data:image/jpeg" in page.read_text()
    draw_category(parts, n_train=0, n_good=0, suffix="bmp", seed=1)
    printed(script(*report))
    assert "its test images changed since; make evaluate" in page.read_text()
    draw_category(parts, n_good=0, n_bad=0, suffix="bmp", seed=1)
    before = contents(folder_of(tmp_path))
    for command in (["train"], ["train", "--dry-run"], ["evaluate"]):
        line = refusal(script(*command, *words))
        assert "trained on other images" in line and "ARGS=--force" in line
    assert contents(folder_of(tmp_path)) == before
    printed(script("train", *words, "--force"))


def test_test_images_that_came_later_or_changed_are_evaluated(script, parts, trained, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(parts / "parts/train", root / "parts/train")
    words, model = train_words(root, tmp_path), folder_of(tmp_path) / "model.pt"
    out = printed(script("train", *words))
    assert "nothing could be evaluated" in out and "expected false alarms 9.1 %" in out
    assert "nothing to evaluate: parts." in (tmp_path / "local/results.md").read_text()
    weights = model.read_bytes()
    shutil.copytree(parts / "parts/test", root / "parts/test")
    line = "evaluate again, its test images changed"
    assert line in printed(script("train", *words, "--dry-run"))
    out = printed(script("train", *words))
    assert "evaluated again" in out and "4 good and 5 defective tested" in out
    assert model.read_bytes() == weights
    assert numbers(folder_of(tmp_path)) == numbers(folder_of(trained))
    assert printed(script("train", *words)).startswith("done before; --force")
    (root / "parts/test/a_bar/000.png").unlink()
    assert "4 good and 4 defective tested" in printed(script("train", *words))
    words = benchmark_words(root, tmp_path, "--dataset=folder")
    printed(script("benchmark", *words))
    (root / "parts/test/a_bar/001.png").unlink()
    out = printed(script("benchmark", *words))
    assert "(evaluated again)" in out and "done before" not in out


def test_other_code_is_refused_and_named(script, parts, finished, tmp_path, monkeypatch):
    words, package = train_words(parts, tmp_path), tmp_path / "ganomaly"
    shutil.copytree(ROOT / "ganomaly", package)
    hashes = provenance.code()
    assert {"losses.py", "training.py", "scoring.py", "images.py"} <= hashes.keys()
    assert not {"report.py", "config.py", "cli.py"} & hashes.keys()
    monkeypatch.setattr(provenance, "__file__", package / "runs/provenance.py")
    monkeypatch.setattr(provenance, "code", provenance.code.__wrapped__)
    losses = package / "losses.py"
    text = '"""Another docstring."""\n# A remark\n' + losses.read_text().split('"""', 2)[2]
    losses.write_text(text)
    assert provenance.code() == hashes
    losses.write_text(text.replace("return F.l1_loss(", "return 2 * F.l1_loss("))
    (package / "new.py").write_text("")
    for more in ([], ["--dry-run"]):
        line = refusal(script("train", *words, *more))
        assert "other code (losses.py, new.py changed since)" in line and "ARGS=--force" in line
    printed(script("benchmark", *benchmark_words(parts, tmp_path, "--dataset=folder")))
    printed(script("evaluate", *words))  # of the model as it is
    (finished / "metrics.json").unlink()
    assert "last.pt is of other code (losses.py, new.py" in refusal(script("train", *words))
    printed(script("train", *words, "--force"))
    assert printed(script("train", *words)).startswith("done before")


def test_force_takes_back_our_files_after_a_kill(script, parts, finished, tmp_path, monkeypatch):
    words = train_words(parts, tmp_path, "--steps=8", "--lr=1e-3")
    (finished / ".ipynb_checkpoints").mkdir()
    (finished / "notes.txt").write_text("mine")
    unlink = type(tmp_path).unlink

    def dying(path, *args, **kwargs):  # each time it has taken back one file more
        unlink(path, *args, **kwargs)
        raise KeyboardInterrupt

    while (finished / "curve.csv").exists():  # the last but TensorBoard's
        assert "another config" in refusal(script("train", *words))  # half taken back
        with monkeypatch.context() as patch:
            patch.setattr(type(finished), "unlink", dying)
            assert script("train", *words, "--force")[0] == 130
    printed(script("train", *words, "--force"))
    expected = numbers(train(parts, tmp_path / "new", "--steps=8", "--lr=1e-3"))
    assert numbers(finished) == expected and (finished / "notes.txt").read_text() == "mine"


def test_evaluate_adds_a_score_that_is_newer_than_the_model(script, parts, finished, tmp_path):
    path, before = finished / "model.pt", numbers(finished)
    whole = torch.load(path)
    old = {name: s for name, s in whole["scores"].items() if name != "feature"}
    torch.save({**whole, "scores": old}, path)
    metrics = read_json(finished / "metrics.json")
    metrics["provenance"]["code"]["scoring.py"] = "older"
    write_json(finished / "metrics.json", metrics)
    printed(script("predict", "--model", path, "--images", parts / "parts/test"))
    out = printed(script("evaluate", *train_words(parts, tmp_path)))
    assert "changed   nothing" in out and numbers(finished) == before
    again = torch.load(path)["scores"]
    assert again.keys() == whole["scores"].keys()
    assert all(torch.equal(again[name], whole["scores"][name]) for name in old)


def test_evaluate_gives_the_same_numbers_of_the_same_images(script, parts, finished, tmp_path):
    shutil.copytree(parts, tmp_path / "images")
    words = train_words(tmp_path / "images", tmp_path)[:6]  # the config is the run's own
    before, table = contents(finished), (tmp_path / "local/results.csv").read_bytes()
    (finished / "scores.csv").unlink()
    out = printed(script("evaluate", *words))
    assert "AUROC" in out and "changed   nothing" in out
    assert contents(finished) == before
    assert (tmp_path / "local/results.csv").read_bytes() == table
    assert "width" in refusal(script("evaluate", *words, "--width=9"))
    assert "no finished run" in refusal(script("evaluate", *words, "--seed=3"))
    assert "is none of latent" in refusal(script("evaluate", *words, "--score=comparator"))
    out = printed(script("evaluate", *words, "--score=contextual"))
    assert f"AUROC {read_json(finished / 'metrics.json')['scores']['contextual']:.3f} (con" in out
    assert "nothing, as the score of this run is latent" in out and contents(finished) == before
    # Its looks in training were at other images
    draw(tmp_path / "images/parts/test/good/new.png", np.random.default_rng(7))
    assert "n_test_good" in printed(script("evaluate", *words))
    assert contents(finished).keys() == before.keys() - {"curve.csv"}
