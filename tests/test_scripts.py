"""The real scripts at tiny size, on drawn images."""

import csv
import errno
import importlib.util
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ganomaly import data, images, load
from ganomaly.config import FIELDS, SCORES, Config
from ganomaly.data import MVTEC
from ganomaly.detector import Detector
from ganomaly.errors import exit_code
from ganomaly.files import Busy, locked
from ganomaly.runs import evaluation, experiment, pipeline, provenance
from ganomaly.runs.run import Recorder, Run

from .conftest import CHANGES, ROOT, TINY, TINY_FLAGS, draw, draw_category, load_script

FIELDS_OF_METRICS = {
    "category", "seed", "score", "auroc", "average_precision", "threshold", "f1", "precision",
    "recall", "accuracy", "f1_max", "f1_trivial", "auroc_brightness", "auroc_mean_distance",
    "auroc_pca", "n_train", "n_calibration", "n_test_good", "n_test_defective", "train_seconds",
    "images_per_second", "scores", "provenance",
}  # fmt: skip


def train_words(root, out, *more, category="parts"):
    return [
        "--dataset=folder", f"--category={category}", "--data-root", root,
        "--experiments-dir", out, *TINY_FLAGS, *more,
    ]  # fmt: skip


def one_line_error(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def folder_of(out, category="parts", seed=42, name="local"):
    return out / name / category / f"seed{seed}"


def numbers(folder) -> tuple[dict, str]:
    """metrics.json less times and provenance, scores.csv."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("train_seconds", "images_per_second", "provenance"):
        del metrics[name]
    return metrics, (folder / "scores.csv").read_text()


# train.py


def test_a_run_leaves_what_the_contract_names(script, parts, tmp_path):
    code, out, err = script("train", *train_words(parts, tmp_path, "--steps=60"))
    assert code == 0, err
    folder = folder_of(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "log.jsonl", "last.pt", "model.pt", "scores.csv"} < names
    assert {"metrics.json", "samples.png"} < names and not any("tmp" in name for name in names)
    assert any(name.startswith("events.out.tfevents") for name in names)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert FIELDS_OF_METRICS <= set(metrics)
    assert {"python", "torch", "device", "cpu", "threads", "commit", "command", "date"} <= set(
        metrics["provenance"]
    )
    assert set(metrics["scores"]) == set(Config().scores)
    assert (metrics["pixel_auroc"], metrics["auroc_brightness_raw"]) == (None, None)
    assert metrics["auroc"] == metrics["scores"]["latent"]
    assert (metrics["n_train"], metrics["n_calibration"]) == (14, 10)
    assert (metrics["n_test_good"], metrics["n_test_defective"]) == (4, 5)
    assert json.loads((folder / "config.json").read_text()).keys() == FIELDS.keys()
    assert [json.loads(x)["step"] for x in (folder / "log.jsonl").read_text().splitlines()] == [50]
    rows = list(csv.DictReader((folder / "scores.csv").open()))
    assert list(rows[0]) == ["path", "defect", "label", *Config().scores]
    assert rows[0]["path"] == "test/a_bar/000.png" and rows[0]["label"] == "1"
    assert rows[8]["defect"] == "good" and rows[8]["label"] == "0"
    for word in ("AUROC", "brightness", "mean image", "PCA-40", "F1-max", "calling all"):
        assert word in out
    # No path of this machine in what git keeps
    for name in ("config.json", "metrics.json", "scores.csv"):
        assert str(parts) not in (folder / name).read_text()
    assert (tmp_path / "local/results.csv").is_file() and not (
        tmp_path / "local/config.json"
    ).exists()


def test_tensorboard_has_losses_pictures_histograms_and_the_config(script, parts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = train_words(parts, tmp_path, "--steps=100", "--checkpoint-every=50")
    assert script("train", *words)[0] == 0
    events = EventAccumulator(str(folder_of(tmp_path)), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    losses = {tag.removeprefix("loss/") for tag in tags["scalars"] if tag.startswith("loss/")}
    assert losses >= {
        "discriminator",
        *"adversarial contextual encoder generator comparator".split(),
    }
    assert set(tags["scalars"]) == {f"loss/{name}" for name in losses} | {"speed/images_per_second"}
    assert [e.step for e in events.Scalars("loss/contextual")] == [50, 100]
    assert [e.step for e in events.Images("reconstructions")] == [50, 100]
    kinds = ("calibration", "good", "defective")
    scores = {f"{score}/{kind}" for score in Config().scores for kind in kinds}
    assert set(tags["histograms"]) == scores | {"latent/z", "latent/z - z_hat"}
    (config,) = events.Tensors("config/text_summary")
    assert b'"latent_dim": 8' in config.tensor_proto.string_val[0]


def test_the_table_names_the_best_checkpoint_an_oracle(script, parts, tmp_path):
    words = [
        "--recipe=digits",
        "--dataset=folder",
        "--data-root",
        parts,
        "--experiment=x",
        "--seeds",
    ]
    words += ["1", "2", "--experiments-dir", tmp_path, *TINY_FLAGS, "--checkpoint-every=2"]
    code, out, err = script("benchmark", *words)
    assert code == 0, err
    best = []
    for seed in (1, 2):
        with open(folder_of(tmp_path, seed=seed, name="x") / "curve.csv") as file:
            best.append(max(float(row["latent"]) for row in csv.DictReader(file)))
    cells = [line for line in out.splitlines() if line.startswith(("| category", "| parts"))]
    titles, row = (line.split(" | ") for line in cells[:2])
    told = row[titles.index("AUROC of the best checkpoint (oracle)")]
    assert told == f"{np.mean(best):.3f} ± {np.std(best, ddof=1):.3f}"


def test_a_finished_run_is_left_alone_until_forced(script, parts, tmp_path):
    words = train_words(parts, tmp_path)
    assert script("train", *words)[0] == 0
    before = {p.name: p.read_bytes() for p in folder_of(tmp_path).iterdir()}
    (tmp_path / "local/results.csv").unlink()
    code, out, _ = script("train", *words, "--checkpoint-every=2")
    assert code == 0 and out.startswith("trained already; --force")
    assert {p.name: p.read_bytes() for p in folder_of(tmp_path).iterdir()} == before
    assert (tmp_path / "local/results.csv").is_file()
    code, _, err = script("train", *words, "--steps=7")
    assert code == 2 and "steps (6 there, 7 asked)" in one_line_error(err)
    assert {p.name: p.read_bytes() for p in folder_of(tmp_path).iterdir()} == before
    assert script("train", *words, "--steps=7", "--force")[0] == 0
    assert json.loads((folder_of(tmp_path) / "config.json").read_text())["steps"] == 7


def test_same_command_same_bytes_alone_or_after_another(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path / "a"))
    script("train", *train_words(parts, tmp_path / "b", "--seed=1"))
    script("train", *train_words(parts, tmp_path / "b"))
    assert numbers(folder_of(tmp_path / "a")) == numbers(folder_of(tmp_path / "b"))


def test_every_config_field_has_an_effect(parts, tmp_path, monkeypatch):
    assert CHANGES.keys() == FIELDS.keys()
    shutil.copytree(parts / "parts", tmp_path / "images" / "parts")
    draw_category(tmp_path / "images" / "7", seed=1)
    base = Config(dataset="folder", category="parts", **TINY)
    saved, threads = [], []
    real = Recorder.save
    monkeypatch.setattr(Recorder, "save", lambda *a: saved.append(a[1]["step"]) or real(*a))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def results(name, config):
        saved.clear()
        threads.clear()
        setting = pipeline.Setting(tmp_path / "images", torch.device("cpu"))
        pipeline.run_one(config, tmp_path / name, setting)
        metrics, scores = numbers(Run(tmp_path / name, config.category, config).folder)
        for echoed in ("category", "dataset", "seed", "score"):
            del metrics[echoed]
        return metrics, scores, list(saved), list(threads)

    expected = results("base", base)
    for name, value in {**CHANGES, "channels": 1}.items():
        more = {"category": "3", "dataset": "digits"} if name == "dataset" else {name: value}
        start = expected
        if name == "comparator_width":
            more, start = {**more, "corrupted": 0.5}, results("c", base.replace(corrupted=0.5))
        assert results(name, base.replace(**more)) != start, f"{name} changes nothing"
    assert results("again", base) == expected  # so that the differences above mean something


def test_training_never_sees_calibration_or_test_images(script, tmp_path):
    root = draw_category(tmp_path / "images" / "parts")
    script("train", *train_words(tmp_path / "images", tmp_path / "a"))
    _, held_out = data.split_calibration(24, Config(category="parts"))
    rng = np.random.default_rng(5)
    files = images.image_files(root / "train" / "good")
    for path in [files[i] for i in held_out] + sorted((root / "test").glob("*/*.png")):
        draw(path, rng, defective=True, size=64)
    script("train", *train_words(tmp_path / "images", tmp_path / "b"))
    states = [torch.load(folder_of(tmp_path / run) / "model.pt", weights_only=True) for run in "ab"]
    for network, state in states[0]["networks"].items():
        for name, value in state.items():
            assert torch.equal(value, states[1]["networks"][network][name]), name
    assert states[0]["threshold"] != states[1]["threshold"]  # they were calibrated with


def test_the_last_look_is_the_result_and_looking_changes_nothing(
    script, parts, tmp_path, monkeypatch
):
    words = train_words(parts, tmp_path / "a", "--checkpoint-every=2")
    assert script("train", *words)[0] == 0
    metrics, scores = numbers(folder_of(tmp_path / "a"))
    rows = list(csv.DictReader((folder_of(tmp_path / "a") / "curve.csv").open()))
    assert [row.pop("step") for row in rows] == ["2", "4", "6"]
    assert rows[-1] == {name: f"{value:.6g}" for name, value in metrics["scores"].items()}
    assert (tmp_path / "a" / "local" / "curves.svg").is_file()
    monkeypatch.setattr(Recorder, "preview", lambda *_: None)
    script("train", *train_words(parts, tmp_path / "b", "--checkpoint-every=2"))
    assert numbers(folder_of(tmp_path / "b")) == (metrics, scores)


CALIBRATED = "--corrupted=.5 --comparator-width=4 --normalise=exposure --score=calibrated".split()


@pytest.mark.slow
def test_a_calibrated_run_has_every_score_and_figures_of_pixels(script, tmp_path):
    root = draw_category(tmp_path / "images" / "parts", n_train=40, n_good=8, n_bad=8)
    for path in (root / "test" / "a_bar").iterdir():  # the bar is what is over 240
        bar = np.asarray(Image.open(path)).min(2) > 240
        mask = root / "ground_truth" / "a_bar" / f"{path.stem}_mask.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(bar).save(mask)
    words = train_words(tmp_path / "images", tmp_path, "--steps=200", "--width=8", *CALIBRATED)
    code, out, err = script("train", *words)
    assert code == 0, err
    metrics, _ = numbers(folder_of(tmp_path))
    assert set(metrics["scores"]) == set(SCORES)
    assert metrics["auroc"] == metrics["scores"]["calibrated"] > 0.9
    assert metrics["pixel_auroc"] > 0.8
    # The bars make an image brighter; of what the network sees that is gone
    assert (metrics["auroc_brightness_raw"], metrics["auroc_brightness"]) == (1.0, 0.5)


@pytest.mark.slow
def test_labels_are_not_inverted(script, tmp_path):
    """Bars that no normal image has score higher, and by every score that sees pixels."""
    draw_category(tmp_path / "images" / "parts", n_train=40, n_good=8, n_bad=8)
    words = train_words(tmp_path / "images", tmp_path, "--steps=150", "--width=8", "--lr=1e-3")
    assert script("train", *words)[0] == 0
    metrics, _ = numbers(folder_of(tmp_path))
    assert metrics["scores"]["contextual"] > 0.8
    assert metrics["auroc_pca"] > 0.9 and metrics["auroc_brightness"] > 0.9


def test_masks_without_a_defective_pixel_are_told_and_give_no_figure(script, tmp_path):
    root = draw_category(tmp_path / "images" / "parts")
    masks = root / "ground_truth" / "a_bar"
    masks.mkdir(parents=True)
    for i in range(5):
        Image.new("L", (40, 40), i % 2).save(masks / f"{i:03}_mask.png")  # 0 and 1, not 255
    code, _, err = script("train", *train_words(tmp_path / "images", tmp_path))
    assert code == 0 and "no pixel of any mask is defective" in err
    assert numbers(folder_of(tmp_path))[0]["pixel_auroc"] is None


def test_without_test_images_it_trains_calibrates_and_says_so(script, tmp_path):
    draw_category(tmp_path / "images" / "parts", n_good=0, defects=())
    code, out, _ = script("train", *train_words(tmp_path / "images", tmp_path))
    assert code == 0 and "nothing could be evaluated" in out
    metrics, scores = numbers(folder_of(tmp_path))
    assert metrics["auroc"] is None and metrics["auroc_pca"] is None and metrics["threshold"] > 0
    assert scores.count("\n") == 1 and (folder_of(tmp_path) / "model.pt").is_file()


def test_a_root_that_is_the_category(script, parts, tmp_path):
    words = ["--dataset=folder", "--data-root", parts / "parts", "--experiments-dir", tmp_path]
    assert script("train", *words, *TINY_FLAGS)[0] == 0
    assert folder_of(tmp_path).is_dir()
    assert script("evaluate", *words)[0] == 0


def test_a_named_experiment_keeps_its_recipe(script, parts, tmp_path):
    words = train_words(parts, tmp_path, "--experiment=mine")
    assert script("train", *words, "--seed=7")[0] == 0
    recipe = json.loads((tmp_path / "mine/config.json").read_text())
    assert recipe["seed"] == 42 and recipe["category"] is None and recipe["width"] == 4
    code, _, err = script("train", *words, "--seed=8", "--width=5")
    assert code == 2 and "width (4 there, 5 asked)" in one_line_error(err)
    code, _, err = script("train", "--config", tmp_path / "mine/config.json", *words, "--lr=1")
    assert code == 2 and "another recipe: lr" in one_line_error(err)


# Interruptions


def phases(monkeypatch, error):
    """Make each stage of a run fail in turn; yields the stage's name."""
    stages = [
        (data, "read_images"), (os, "fsync"), (pipeline, "train"), (Recorder, "save"),
        (Detector, "calibrate"), (Run, "write_samples"), (Detector, "scores"),
        (Run, "write_scores"), (evaluation, "figures"), (evaluation, "write_json"),
        (pipeline, "write_torch"), (experiment, "write_results"),
    ]  # fmt: skip

    def fail(*args, **kwargs):
        raise error

    for owner, name in stages:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            yield name


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, code",
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "some/file"), 2),
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (torch.AcceleratorError("CUDA error: out of memory"), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2),
    ],
    ids=["ctrl-c", "disk", "permission", "gpu memory", "gpu memory, beside torch", "memory"],
)
def test_ctrl_c_and_other_troubles_in_every_phase(
    script, parts, tmp_path, monkeypatch, error, code
):
    script("train", *train_words(parts, tmp_path / "whole"))
    expected = numbers(folder_of(tmp_path / "whole"))
    script("train", *train_words(parts, tmp_path, "--seed=1"))  # a finished result beside
    beside = {p.name: p.read_bytes() for p in folder_of(tmp_path, seed=1).iterdir()}
    words = train_words(parts, tmp_path, "--checkpoint-every=2")
    for stage in phases(monkeypatch, error):
        got, _, err = script("train", *words)
        assert got == code and "Traceback" not in err, (stage, err)
        told = [line for line in err.splitlines() if line and "seed 42: " not in line]
        assert len(told) == 1 and told[0].startswith(("error: ", "interrupted")), (stage, err)
    assert script("train", *words)[0] == 0  # goes on from where it was
    assert numbers(folder_of(tmp_path)) == expected
    assert {p.name: p.read_bytes() for p in folder_of(tmp_path, seed=1).iterdir()} == beside


def test_a_lost_gpu_ends_the_process_and_is_no_failed_run(script, parts, tmp_path, monkeypatch):
    asked = []

    def lost(config, *_):
        asked.append(config.seed)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(pipeline, "train", lost)
    with pytest.raises(torch.AcceleratorError):
        words = benchmark_words(parts, tmp_path, "--dataset=folder", "--seeds", "1", "2")
        script("benchmark", *words)
    assert asked == [1]


def start(words, cwd=ROOT):
    command = [sys.executable, "scripts/train.py", *map(str, words)]
    return subprocess.Popen(
        command, cwd=cwd, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline, "the run never got there"
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_then_the_same_command_gives_the_same_bytes(script, parts, tmp_path):
    more = ["--steps=400", "--checkpoint-every=20"]
    assert script("train", *train_words(parts, tmp_path / "whole", *more))[0] == 0
    words = train_words(parts, tmp_path / "killed", *more)
    folder = folder_of(tmp_path / "killed")
    process = start(words)
    wait_for((folder / "last.pt").exists, process)
    process.kill()
    process.communicate()
    assert not (folder / "metrics.json").exists(), "killed too late to show anything"
    assert script("train", *words)[0] == 0
    assert numbers(folder) == numbers(folder_of(tmp_path / "whole"))
    curves = [(f / "curve.csv").read_text() for f in (folder, folder_of(tmp_path / "whole"))]
    assert curves[0] == curves[1] and curves[0].count("\n") == 21
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(50, 401, 50))


@pytest.mark.slow
def test_ctrl_c_of_the_real_process_is_one_line_and_130(parts, tmp_path):
    process = start(train_words(parts, tmp_path, "--steps=100000"))
    wait_for((folder_of(tmp_path) / "log.jsonl").exists, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("interrupted: the same command")


def test_old_metrics_beside_an_interrupted_retraining_do_not_make_it_finished(
    script, parts, tmp_path, monkeypatch
):
    """A fresh clone has committed metrics.json files and no model.pt."""
    words = train_words(parts, tmp_path)
    script("train", *words)
    folder = folder_of(tmp_path)
    expected = numbers(folder)
    (folder / "model.pt").unlink()
    edited = {**json.loads((folder / "metrics.json").read_text()), "auroc": 0.123}
    (folder / "metrics.json").write_text(json.dumps(edited))
    for stage in phases(monkeypatch, KeyboardInterrupt()):
        code, out, _ = script("train", *words)
        assert "0.123" not in out, stage
    code, out, _ = script("train", *words)
    assert code == 0 and numbers(folder) == expected


@pytest.mark.slow
def test_force_takes_back_our_files_only_and_survives_a_kill(script, parts, tmp_path, monkeypatch):
    words = train_words(parts, tmp_path)
    script("train", *words)
    folder = folder_of(tmp_path)
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "notes.txt").write_text("mine")
    new = [*words, "--steps=8", "--lr=1e-3"]
    script("train", *train_words(parts, tmp_path / "new", "--steps=8", "--lr=1e-3"))
    unlink, removed = type(folder).unlink, []

    def die_at(n):
        def dying(path, *args, **kwargs):
            removed.append(path.name)
            if len(removed) == n:
                raise KeyboardInterrupt
            return unlink(path, *args, **kwargs)

        return dying

    for n in (1, 2, 3, 5, 7):
        with monkeypatch.context() as patch:
            patch.setattr(type(folder), "unlink", die_at(n))
            removed.clear()
            assert script("train", *new, "--force")[0] in (0, 130)
        script("train", *words, "--force")  # the old one again
    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "unlink", die_at(6))
        removed.clear()
        assert script("train", *new, "--force")[0] == 130
    code, _, err = script("train", *new)  # half taken back: the new config may not go on with it
    if code == 2:
        assert "another config" in one_line_error(err)
    else:
        assert numbers(folder) == numbers(folder_of(tmp_path / "new"))
    assert (folder / "notes.txt").read_text() == "mine"
    assert script("train", *new, "--force")[0] == 0
    assert numbers(folder) == numbers(folder_of(tmp_path / "new"))


def test_a_checkpoint_of_another_config_does_not_go_on(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    folder = folder_of(tmp_path)
    for name in ("config.json", "metrics.json"):
        (folder / name).unlink()
    code, _, err = script("train", *train_words(parts, tmp_path, "--width=5"))
    assert code == 2 and "width (4 there, 5 asked)" in one_line_error(err)


def test_names_that_are_not_utf8_are_kept(script, tmp_path):
    root = draw_category(tmp_path / "images" / "parts")
    name = os.fsdecode(b"sch\xf6n.png")
    (root / "test" / "good" / "000.png").rename(root / "test" / "good" / name)
    assert script("train", *train_words(tmp_path / "images", tmp_path))[0] == 0
    assert b"test/good/sch\xf6n.png" in (folder_of(tmp_path) / "scores.csv").read_bytes()
    model, output = folder_of(tmp_path) / "model.pt", tmp_path / "o.csv"
    words = ["--model", model, "--images", root / "test" / "good", "--output", output]
    assert script("predict", *words)[0] == 0
    assert b"sch\xf6n.png" in output.read_bytes()


def test_other_images_of_the_same_name_are_not_taken_for_the_run(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    draw_category(tmp_path / "other" / "parts", n_train=30, seed=5)
    words = train_words(tmp_path / "other", tmp_path)
    for name in ("train", "evaluate"):
        code, _, err = script(name, *words)
        assert code == 2 and "trained on other images" in one_line_error(err)
    code, _, err = script("train", *train_words(tmp_path / "nowhere", tmp_path))
    assert code == 2 and "no folder" in one_line_error(err)
    assert script("train", *words, "--force")[0] == 0


def test_uncompressed_images_replaced_in_place_are_other_images(script, tmp_path):
    def bmp(folder: Path, low: int, high: int, n: int) -> None:
        rng = np.random.default_rng(low)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = rng.integers(low, high, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02}.bmp")

    root = tmp_path / "images"
    for place, n in (("train/good", 24), ("test/good", 4), ("test/bad", 4)):
        bmp(root / "parts" / place, 60, 90, n)
    words = train_words(root, tmp_path)
    report = ["--experiments-dir", tmp_path, "--data-root", root]
    assert script("train", *words)[0] == 0
    assert script("report", *report)[0] == 0
    page = tmp_path / "local" / "report.html"
    assert "data:image/png" in page.read_text()
    bmp(root / "parts" / "test" / "bad", 200, 230, 4)  # of the same names and sizes
    assert script("report", *report)[0] == 0
    assert "its test images changed since; make evaluate" in page.read_text()
    bmp(root / "parts" / "train" / "good", 200, 230, 24)
    before = numbers(folder_of(tmp_path))
    for name in ("train", "evaluate"):
        code, out, err = script(name, *words)
        assert code == 2 and "trained on other images" in one_line_error(err) and out == ""
        assert "ARGS=--force" in err
    assert numbers(folder_of(tmp_path)) == before
    assert "trained on other images" in script("train", *words, "--dry-run")[2]


def test_test_images_that_came_later_or_changed_are_evaluated(script, parts, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(parts / "parts" / "train", root / "parts" / "train")
    words, model = train_words(root, tmp_path), folder_of(tmp_path) / "model.pt"
    assert "nothing could be evaluated" in script("train", *words)[1]
    weights = model.read_bytes()
    shutil.copytree(parts / "parts" / "test", root / "parts" / "test")
    assert "evaluate again, its test images changed" in script("train", *words, "--dry-run")[1]
    code, out, _ = script("train", *words)
    assert code == 0 and "evaluated again" in out and "4 good and 5 defective tested" in out
    assert model.read_bytes() == weights
    whole = train_words(parts, tmp_path / "whole")
    assert script("train", *whole)[0] == 0
    assert numbers(folder_of(tmp_path)) == numbers(folder_of(tmp_path / "whole"))
    assert script("train", *words)[1].startswith("trained already; --force")
    (root / "parts/test/a_bar/000.png").unlink()
    code, out, _ = script("train", *words)
    assert code == 0 and "4 good and 4 defective tested" in out
    code, out, _ = script("benchmark", *benchmark_words(root, tmp_path, "--dataset=folder"))
    (root / "parts/test/a_bar/001.png").unlink()
    code, out, _ = script("benchmark", *benchmark_words(root, tmp_path, "--dataset=folder"))
    assert code == 0 and "(evaluated again)" in out and "done before" not in out


def test_other_code_is_told_with_the_modules_names(script, parts, tmp_path, monkeypatch):
    """test_clone.py edits the code itself."""
    words = train_words(parts, tmp_path)
    assert script("train", *words)[0] == 0
    hashes = {**provenance.code(), "losses.py": "0", "new.py": "1"}
    assert {"losses.py", "training.py", "scoring.py", "images.py"} <= hashes.keys()
    assert not {"report.py", "config.py", "cli.py"} & hashes.keys()
    monkeypatch.setattr(provenance, "code", lambda: hashes)
    for more in ([], ["--dry-run"]):
        code, out, err = script("train", *words, *more)
        assert code == 2 and "other code (losses.py, new.py changed since)" in one_line_error(err)
        assert "AUROC" not in out
    code, _, err = script("benchmark", *benchmark_words(parts, tmp_path, "--dataset=folder"))
    assert code == 0, err  # an experiment of its own
    assert script("evaluate", *words)[0] == 0  # of the model as it is
    assert script("train", *words, "--force")[0] == 0
    assert script("train", *words)[1].startswith("trained already")


def test_a_figure_that_fails_costs_no_model(script, parts, tmp_path, monkeypatch):
    words = train_words(parts, tmp_path)
    assert script("train", *train_words(parts, tmp_path / "whole"))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "pixel_auroc", lambda *_: np.empty(2**60, np.uint8))
        code, _, err = script("train", *words)
        assert code == 2 and "out of memory" in one_line_error(err)
    model = folder_of(tmp_path) / "model.pt"
    test = parts / "parts" / "test"
    assert script("predict", "--model", model, "--images", test)[0] == 0
    assert script("train", *words)[0] == 0  # it goes on behind the last step
    assert numbers(folder_of(tmp_path)) == numbers(folder_of(tmp_path / "whole"))


def test_why_a_model_or_a_checkpoint_does_not_fit_is_said(script, parts, tmp_path):
    words = train_words(parts, tmp_path)
    assert script("train", *words)[0] == 0
    folder = folder_of(tmp_path)
    reason = "size mismatch for encoder1.features.2.weight"
    for name, key in (("model.pt", "networks"), ("last.pt", None)):
        state = torch.load(folder / name, weights_only=True)
        networks = state if key is None else state[key]
        weights = networks["generator"]["encoder1.features.2.weight"]
        networks["generator"]["encoder1.features.2.weight"] = weights[:1]
        torch.save(state, folder / name)
        code, _, err = script("evaluate" if key else "train", *words)
        assert code == 2 and reason in one_line_error(err), err
        (folder / "metrics.json").unlink(missing_ok=True)


def test_force_takes_another_recipe_into_a_named_experiment(script, parts, tmp_path):
    words = train_words(parts, tmp_path, "--experiment=mine")
    assert script("train", *words)[0] == 0
    code, _, err = script("train", *words, "--width=5")
    assert code == 2 and "ARGS=--force" in one_line_error(err)
    assert script("train", *words, "--width=5", "--force")[0] == 0
    assert json.loads((tmp_path / "mine/config.json").read_text())["width"] == 5
    assert script("train", *words, "--width=5", "--seed=1")[0] == 0
    assert script("train", *words, "--width=6", "--force")[0] == 0  # seed 1 stays as it was
    names = [row["category"] for row in csv.DictReader((tmp_path / "mine/results.csv").open())]
    assert names == ["parts", "parts"]  # and there are no means
    both = ["--dataset=folder", "--data-root", parts, "--experiments-dir", tmp_path]
    both += [*TINY_FLAGS, "--experiment=mine", "--seeds", "42", "1", "--width=6"]
    code, out, err = script("benchmark", *both)
    assert code == 1 and "failed parts seed 1: " in err and "width (5 there, 6 asked)" in err
    code, out, err = script("benchmark", *both, "--force")
    assert code == 0 and "done before" not in out, err
    assert "all 2 runs were done before" in script("benchmark", *both)[1]


def test_a_recipe_that_is_not_there_lists_those_that_git_keeps(script):
    for name in ("train", "benchmark", "ablate"):
        code, _, err = script(name, "--recipe=calibratd")
        assert code == 2 and "did you mean 'calibrated'?" in one_line_error(err)
        code, _, err = script(name, "--recipe=qqq")
        assert "there: calibrated, digits, mnist, paper" in one_line_error(err)


def test_a_folder_that_is_the_category_is_taken_by_every_command(script, parts, tmp_path):
    where = ["--dataset=folder", "--data-root", parts / "parts", "--experiments-dir", tmp_path]
    code, out, err = script("benchmark", *where, *TINY_FLAGS)
    assert code == 0 and "parts seed 42: AUROC" in out, err
    some = ["--only", "base", "no encoder loss"]
    code, out, err = script("ablate", *where, *some, *ablation_words(parts, tmp_path)[:2])
    assert code == 0 and "| no encoder loss |" in out, err
    assert script("train", *where, *TINY_FLAGS)[0] == 0
    # A report of folders says nothing of the digits; one of ablations has their table
    code, _, err = script("report", *where[1:])
    assert code == 0 and "digits" not in err
    code, _, err = script("report", *where[1:], "--experiment=local/ablations-recipe")
    hint = "--experiment local/ablations-recipe/NAME takes base, no-encoder-loss"
    assert code == 2 and hint in one_line_error(err)
    base = ["--experiment=local/ablations-recipe/base"]
    assert script("report", *where[1:], *base)[0] == 0


def test_the_digits_need_no_root_and_say_so(script, tmp_path):
    flags = ["--steps=2", "--width=4", "--data-root", tmp_path]
    code, _, err = script("train", *flags)
    assert code == 0 and "the digits need no --data-root" in err


def test_a_table_that_nothing_was_done_for_is_not_printed(script, parts, tmp_path):
    some = ["--only", "base", "--seeds", 1]
    assert script("ablate", *ablation_words(parts, tmp_path, *some))[0] == 0
    folder = tmp_path / "local" / "ablations-recipe"
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("results.*")}
    code, out, err = script("ablate", *ablation_words(parts, tmp_path, *some, "--steps=9"))
    assert code == 1 and out == "" and "steps (6 there, 9 asked)" in err
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("results.*")} == before
    # And a printed table is of what was asked for
    assert (
        script("ablate", *ablation_words(parts, tmp_path, "--only", "base", "--seeds", 2))[0] == 0
    )
    code, out, _ = script("ablate", *ablation_words(parts, tmp_path, *some))
    assert code == 0 and "seeds 1:" in out and "seeds 1, 2" in (folder / "results.md").read_text()


def test_output_spares_inputs_and_goes_through_links_and_pipes(
    script, parts, tmp_path, monkeypatch
):
    script("train", *train_words(parts, tmp_path))
    model = folder_of(tmp_path) / "model.pt"
    content = model.read_bytes()
    words = ["--model", model, "--images", parts / "parts" / "test", "--output"]
    for bad in (model, parts / "parts/test/good/000.png", tmp_path):
        code, _, err = script("predict", *words, bad)
        assert code == 2 and "--output" in one_line_error(err)
    assert model.read_bytes() == content
    target, link, fifo = (tmp_path / name for name in ("target.csv", "link.csv", "fifo"))
    target.write_text("old")
    link.symlink_to(target)
    assert script("predict", *words, link)[0] == 0
    assert link.is_symlink() and target.read_text().startswith("path,score")
    os.mkfifo(fifo)
    reader = subprocess.Popen(["timeout", "30", "cat", fifo], stdout=subprocess.PIPE, text=True)
    assert script("predict", *words, fifo)[0] == 0
    assert reader.communicate(timeout=30)[0] == target.read_text()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    code, _, err = script("predict", *words, tmp_path / "closed" / "a.csv")
    assert code == 2 and "cannot be written to" in one_line_error(err)


@pytest.mark.slow
def test_a_report_and_an_export_go_through_links_and_pipes_too(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    report = ["report", "--experiments-dir", tmp_path, "--experiment", "local"]
    export = ["export", "--model", folder_of(tmp_path) / "model.pt"]
    target, link, fifo = (tmp_path / name for name in ("target", "link", "fifo"))
    link.symlink_to(target)
    os.mkfifo(fifo)
    for words in (report, export):
        code, _, err = script(*words, "--output", link)
        assert code == 0 and link.is_symlink() and target.stat().st_size > 1000, err
        with open(tmp_path / "read", "wb") as read:
            reader = subprocess.Popen(["timeout", "30", "cat", fifo], stdout=read)
        code, _, err = script(*words, "--output", fifo)
        assert code == 0 and fifo.is_fifo() and reader.wait() == 0, err
        sizes = [(tmp_path / name).stat().st_size for name in ("read", "target")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    words = ["--model", folder_of(tmp_path) / "model.pt", "--images", parts / "parts" / "test"]
    with open("/dev/full", "w") as full:
        run = [sys.executable, ROOT / "scripts/predict.py", *words]
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr.splitlines()[-1]
    assert "Exception" not in done.stderr


def test_missing_packages_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "torch")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "ganomaly/cli.py"))
    assert end.value.code == 2
    told = one_line_error(capsys.readouterr().err)
    assert "torch" in told and "pip install -r requirements.txt" in told


def test_a_network_that_diverged_is_one_line(script, parts, tmp_path, monkeypatch):
    real = pipeline.train

    def diverged(*args):
        trained = real(*args)
        torch.nn.init.constant_(trained.networks["generator"].encoder2.head.weight, float("inf"))
        return trained

    monkeypatch.setattr(pipeline, "train", diverged)
    code, _, err = script("train", *train_words(parts, tmp_path))
    assert code == 2 and "not finite" in one_line_error(err)


# evaluate.py, predict.py


def test_evaluate_rewrites_identical_numbers(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    folder = folder_of(tmp_path)
    names = ("metrics.json", "scores.csv")
    before = {name: (folder / name).read_bytes() for name in names}
    table = (tmp_path / "local/results.csv").read_bytes()
    (folder / "scores.csv").unlink()
    where = [
        "--dataset=folder",
        "--category=parts",
        "--data-root",
        parts,
        "--experiments-dir",
        tmp_path,
    ]
    code, out, err = script("evaluate", *where)
    assert code == 0 and "AUROC" in out and "changed   nothing" in out, err
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert (tmp_path / "local/results.csv").read_bytes() == table
    code, _, err = script("evaluate", *where, "--width=9")
    assert code == 2 and "width" in one_line_error(err)
    code, _, err = script("evaluate", *where, "--seed=3")
    assert code == 2 and "no finished run" in one_line_error(err)


def test_evaluate_adds_a_score_that_is_newer_than_the_model(script, parts, tmp_path):
    words = train_words(parts, tmp_path)
    script("train", *words)
    path = folder_of(tmp_path) / "model.pt"
    whole, numbers_before = torch.load(path), numbers(folder_of(tmp_path))
    old = {name: s for name, s in whole["scores"].items() if name != "feature"}
    torch.save({**whole, "scores": old}, path)
    assert script("predict", "--model", path, "--images", parts / "parts/test")[0] == 0
    code, out, err = script("evaluate", *words)
    assert code == 0 and "changed   nothing" in out, err
    again = torch.load(path)
    assert numbers(folder_of(tmp_path)) == numbers_before
    assert again["scores"].keys() == whole["scores"].keys()
    assert all(torch.equal(again["scores"][name], whole["scores"][name]) for name in old)


def test_evaluate_on_more_images_forgets_looks_at_the_others(script, parts, tmp_path):
    shutil.copytree(parts, tmp_path / "images")
    words = train_words(tmp_path / "images", tmp_path)
    script("train", *words)
    curve = folder_of(tmp_path) / "curve.csv"
    assert script("evaluate", *words)[0] == 0 and curve.is_file()
    draw(tmp_path / "images/parts/test/good/new.png", np.random.default_rng(7))
    code, out, _ = script("evaluate", *words)
    assert code == 0 and "n_test_good" in out and not curve.exists()


def test_predict_gives_the_scores_of_the_run(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    model = folder_of(tmp_path) / "model.pt"
    code, out, err = script("predict", "--model", model, "--images", parts / "parts" / "test")
    assert code == 0
    rows = list(csv.DictReader(out.splitlines()))
    assert list(rows[0]) == ["path", "score", "threshold", "verdict", "p_value"]
    recorded = list(csv.DictReader((folder_of(tmp_path) / "scores.csv").open()))
    assert len(rows) == 9 and "9 images" in err
    for row, known in zip(rows, recorded, strict=True):
        assert row["path"].endswith(known["path"])
        assert float(row["score"]) == pytest.approx(float(known["latent"]), rel=1e-5)
        above = float(row["score"]) > float(row["threshold"])
        assert row["verdict"] == ("defective" if above else "normal")
        assert above == (float(row["p_value"]) <= 1 / 11)  # ten held out: the largest of them


def test_a_quantile_moves_the_threshold_and_says_what_it_stands_for(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    words = ["--model", folder_of(tmp_path) / "model.pt", "--images", parts / "parts" / "test"]
    counts = {}
    for quantile in ("0.3", "0.7"):
        code, out, err = script("predict", *words, "--quantile", quantile)
        rows = list(csv.DictReader(out.splitlines()))
        counts[quantile] = sum(row["verdict"] == "defective" for row in rows)
        level = 1 - {"0.3": 4, "0.7": 8}[quantile] / 11
        assert code == 0 and f"{level:.1%} are expected above the threshold" in err
        for row in rows:  # to the digits that are written
            assert (row["verdict"] == "defective") == (float(row["p_value"]) < level + 1e-3)
    assert counts["0.3"] >= counts["0.7"]
    code, _, err = script("predict", *words, "--quantile", "95")
    assert code == 2 and "quantile: 95.0 is not allowed" in one_line_error(err)


def test_paths_come_from_patterns_and_pipes_in_their_order(script, parts, tmp_path, monkeypatch):
    script("train", *train_words(parts, tmp_path))
    model, test = folder_of(tmp_path) / "model.pt", parts / "parts" / "test"
    code, out, _ = script("predict", "--model", model, "--images", test / "**" / "00[12].png")
    paths = [row["path"] for row in csv.DictReader(out.splitlines())]
    assert code == 0
    assert paths == [str(test / d / f"00{i}.png") for d in ("a_bar", "good") for i in (1, 2)]
    code, _, err = script("predict", "--model", model, "--images", test / "*.tif")
    assert code == 2 and "no image matches" in one_line_error(err)
    lines = [str(test / "good" / "003.png"), str(test / "gone.png"), str(test / "a_bar")]
    pipe = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))
    monkeypatch.setattr(sys, "stdin", pipe)
    code, out, err = script("predict", "--model", model, "--images", "-")
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 1 and [row["path"] for row in rows] == lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    code, _, err = script("predict", "--model", model, "--images", "-")
    assert code == 2 and "no paths came" in one_line_error(err)
    assert rows[0]["score"] and "No such file" in rows[1]["verdict"]
    assert "directory" in rows[2]["verdict"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.png\0b.png\0")))
    code, _, err = script("predict", "--model", model, "--images", "-")
    assert code == 2 and "-print0" in one_line_error(err)
    names = ["a\x0cb.png", "c\u2028d.png\r"]
    lines = io.TextIOWrapper(io.BytesIO("\n".join(names).encode()))
    monkeypatch.setattr(sys, "stdin", lines)
    code, out, _ = script("predict", "--model", model, "--images", "-")
    assert [row["path"] for row in csv.DictReader(io.StringIO(out))] == [
        "a\x0cb.png",
        "c\u2028d.png",
    ]


def test_a_folder_that_cannot_be_read_is_a_row(script, parts, tmp_path, monkeypatch):
    script("train", *train_words(parts, tmp_path))
    model, test = folder_of(tmp_path) / "model.pt", parts / "parts" / "test"
    real = os.scandir

    def closed(path):  # root may read anything
        if str(path).endswith("a_bar"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    code, out, err = script("predict", "--model", model, "--images", test)
    rows = {row["path"]: row["verdict"] for row in csv.DictReader(out.splitlines())}
    assert code == 1 and rows[str(test / "a_bar")].startswith("unreadable: ") and len(rows) == 5


def test_a_loop_of_links_is_told(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    code, _, err = script("train", *train_words(loop, tmp_path)[:1], "--data-root", loop)
    assert code == 2 and "no folder" in one_line_error(err)
    words = ["--model", folder_of(tmp_path) / "model.pt", "--images", parts / "parts" / "test"]
    code, _, err = script("predict", *words, "--output", loop, "--heatmaps", tmp_path / "heat")
    assert code == 0, err


def test_heat_maps_keep_relative_paths_and_one_scale(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    test, heat = parts / "parts" / "test", tmp_path / "heat"
    words = ["--model", folder_of(tmp_path) / "model.pt", "--images", test]
    code, _, err = script("predict", *words, "--heatmaps", heat)
    assert code == 0 and f"heat maps in {heat}" in err
    names = {path.relative_to(test) for path in test.rglob("*.png")}
    assert {path.relative_to(heat) for path in heat.rglob("*.png")} == names
    with Image.open(heat / "a_bar" / "000.png") as picture:
        assert picture.size == (768, 256)
        left = np.asarray(picture)[:, :256].astype(int)
    with Image.open(test / "a_bar" / "000.png") as image:
        assert abs(left - np.asarray(image.resize((256, 256), 2)).astype(int)).max() <= 1
    # Nothing of ours may fall on an image or on another heat map
    before = (test / "good" / "000.png").read_bytes()
    code, _, err = script("predict", *words, "--heatmaps", test)
    assert code == 2 and "holds images to score" in one_line_error(err)
    assert (test / "good" / "000.png").read_bytes() == before
    copies, mine = tmp_path / "copies", tmp_path / "mine"
    shutil.copytree(test, copies)
    (mine / "good").mkdir(parents=True)
    shutil.copy(test / "good" / "000.png", mine / "good" / "000.png")
    # An input of another folder, a file that is nobody's input, heat maps among the images
    for more, folder in (([copies / "good"], copies), ([], mine), ([], test / "heat")):
        code, _, err = script("predict", *words, *more, "--heatmaps", folder)
        assert (code == 2) == (folder != test / "heat"), err
    assert (copies / "good" / "000.png").read_bytes() == before
    assert (mine / "good" / "000.png").read_bytes() == before
    code, _, err = script("predict", *words, "--heatmaps", test / "heat")
    assert code == 2 and "holds images to score" in one_line_error(err)
    shutil.rmtree(test / "heat")
    twice = [test / "good", test / "a_bar"]
    code, _, err = script("predict", *words[:3], *twice, "--heatmaps", heat)
    assert code == 2 and "score them apart" in one_line_error(err)


@pytest.mark.slow
def test_predict_waits_for_no_import_that_it_does_not_need(script, parts, tmp_path):
    more = ["--corrupted=0.5", "--comparator-width=3", "--score=calibrated"]
    assert script("train", *train_words(parts, tmp_path, *more))[0] == 0
    code = (
        "import runpy, sys; script = sys.argv.pop(1); sys.argv[0] = script\n"
        "try: runpy.run_path(script, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print({'sklearn', 'scipy', 'torchvision', 'tensorboard'} & set(sys.modules))"
    )
    words = [ROOT / "scripts/predict.py", "--model", folder_of(tmp_path) / "model.pt"]
    words += ["--images", parts / "parts/test", "--output", tmp_path / "scores.csv"]
    words += ["--heatmaps", tmp_path / "maps"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_predict_goes_on_past_an_unreadable_image(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    bad = tmp_path / "bad.png"
    bad.write_text("hello")
    good = parts / "parts" / "test" / "good"
    output = tmp_path / "out.csv"
    code, out, err = script(
        "predict", "--model", folder_of(tmp_path) / "model.pt",
        "--images", bad, good / "001.png", good, "--output", output,
    )  # fmt: skip
    assert code == 1 and out == "" and "1 unreadable" in err
    rows = list(csv.DictReader(output.open()))
    assert [row["path"] for row in rows][:3] == [
        str(bad),
        str(good / "001.png"),
        str(good / "000.png"),
    ]
    assert rows[0]["score"] == "" and rows[0]["verdict"] == "unreadable: not an image"
    assert rows[1]["score"] == rows[3]["score"] or float(rows[1]["score"]) == pytest.approx(
        float(rows[3]["score"]), rel=1e-5
    )


def test_a_dry_run_says_what_would_be_done_and_does_nothing(script, parts, fifteen, tmp_path):
    words = train_words(parts, tmp_path)
    code, out, _ = script("train", *words, "--dry-run")
    folder = folder_of(tmp_path)
    assert code == 0 and f"would: {folder}: train 6 steps" in out and '"latent_dim": 8' in out
    assert not folder.exists()
    code, _, err = script("train", *train_words(parts, tmp_path, category="prats"), "--dry-run")
    assert code == 2 and "prats" in one_line_error(err) and "categories there: parts" in err
    script("train", *words)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "finished, left alone" in script("train", *words, "--dry-run")[1]
    assert "train 6 steps anew" in script("train", *words, "--dry-run", "--force")[1]
    (folder / "metrics.json").rename(tmp_path / "aside")
    assert "go on from its checkpoint" in script("train", *words, "--dry-run")[1]
    assert script("train", *words, "--dry-run", "--steps=9")[0] == 2
    (tmp_path / "aside").rename(folder / "metrics.json")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    words = benchmark_words(fifteen, tmp_path / "b", "--categories", "tile", "wood", "--dry-run")
    code, out, _ = script("benchmark", *words)
    assert code == 0 and out.count("train 6 steps") == 2 and not (tmp_path / "b").exists()
    code, out, _ = script("ablate", *words, "--seeds", "1", "--only", "base", "no encoder loss")
    assert code == 0 and out.count("train 6 steps") == 4 and not (tmp_path / "b").exists()
    words = ["--dataset=mnist", "--data-root", tmp_path / "b", "--experiments-dir", tmp_path]
    words.append("--dry-run")
    code, out, _ = script("benchmark", *words, "--download")  # MNIST is what it would download
    assert code == 0 and out.count("train 11800 steps") == 10 and not (tmp_path / "b").exists()
    assert script("benchmark", *words)[0] == 2


def test_a_dry_run_tells_what_would_be_refused_beside_the_rest(script, fifteen, tmp_path):
    words = benchmark_words(fifteen, tmp_path, "--categories", "tile", "wood")
    assert script("benchmark", *words)[0] == 0
    config = folder_of(tmp_path, "tile", name="all") / "config.json"
    config.write_text(config.read_text().replace('"width": 4', '"width": 5'))
    code, out, _ = script("benchmark", *words, "--dry-run")
    assert code == 1 and "finished, left alone" in out
    assert "tile seed 42: refused, " in out and "width (5 there, 4 asked)" in out


# Several processes


def test_what_a_restart_does_not_mend_is_no_failure_to_a_launcher(script, parts, monkeypatch):
    assert [exit_code(code) for code in (0, 1, 2, 130)] == [0, 1, 2, 130]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert [exit_code(code) for code in (0, 1, 2, 130)] == [0, 1, 2, 130]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert [exit_code(code) for code in (0, 1, 2, 130)] == [0, 0, 0, 130]
    monkeypatch.setenv("WORLD_SIZE", "2")  # as make benchmark WORKERS=2 ARGS=--force looks first
    code, _, err = script("benchmark", "--data-root", parts, "--force", "--dry-run")
    assert code == 2 and "--force" in one_line_error(err)


def holder(folder: Path, seconds=60) -> subprocess.Popen:
    """A process that holds a folder's lock."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        f"from ganomaly.files import locked\n"
        f"with locked(Path({str(folder)!r})): print('held', flush=True); time.sleep({seconds})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_second_process_on_a_run_stops_and_a_dead_one_is_no_hindrance(script, parts, tmp_path):
    words = train_words(parts, tmp_path)
    other = holder(folder_of(tmp_path))
    code, _, err = script("train", *words)
    assert code == 2 and "another process is at work on this run" in one_line_error(err)
    assert [p.name for p in folder_of(tmp_path).iterdir()] == [".lock"]
    other.kill()
    other.wait()
    assert script("train", *words)[0] == 0
    other = holder(folder_of(tmp_path))
    for name in ("train", "evaluate"):
        assert script(name, *words)[0] == 2
    other.kill()
    other.wait()
    assert script("evaluate", *words)[0] == 0


def test_a_lock_that_cannot_be_made_is_told_not_tried_for_ever(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(tmp_path / "nowhere" / "lock")
    with pytest.raises(FileNotFoundError), locked(folder):
        pass


def test_a_lock_without_a_run_leaves_nothing(tmp_path):
    with locked(tmp_path / "a" / "b" / "seed1"):
        with pytest.raises(Busy), locked(tmp_path / "a" / "b" / "seed1"):
            pass
        assert (tmp_path / "a/b/seed1/.lock").is_file()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_benchmarks_share_the_work_and_the_table_though_a_third_dies(script, fifteen, tmp_path):
    words = ["--categories", "tile", "wood", "--seeds", "1", "2"]
    words += ["--steps=150", "--checkpoint-every=25"]
    serial = benchmark_words(fifteen, tmp_path / "serial", *words)
    assert script("benchmark", *serial)[0] == 0
    both = benchmark_words(fifteen, tmp_path / "both", *words)
    command = [sys.executable, ROOT / "scripts/benchmark.py", *both]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    third = processes.pop()
    while not list((tmp_path / "both").rglob("last.pt")) and third.poll() is None:
        time.sleep(0.02)
    third.kill()
    third.communicate()
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    # Each run was trained by one of them, or by the third before it died
    assert 4 <= sum(out.count("(done before)") for out, _ in told) <= 6
    tables = []
    for name in ("serial", "both"):
        rows = list(csv.DictReader((tmp_path / name / "all" / "results.csv").open()))
        results = list(rows[0])[: list(rows[0]).index("train_seconds")]
        tables.append([[row[column] for column in results] for row in rows])
    assert tables[0] == tables[1] and len(tables[0]) == 6


# export.py


@pytest.mark.slow
def test_an_exported_program_says_the_same_without_this_repository(script, parts, tmp_path):
    out = tmp_path / "runs"
    more = ["--corrupted=0.5", "--comparator-width=3", "--normalise=exposure", "--score=calibrated"]
    assert script("train", *train_words(parts, out, *more))[0] == 0
    model, program = folder_of(out) / "model.pt", tmp_path / "program.pt2"
    # The real process: what it imports while it traces must not end in the program
    words = ["--model", model, "--output", program, "--quantile", "0.5"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/export.py", *words], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "45.5% of normal images" in done.stdout
    detector = load(model, "cpu")
    detector.set_quantile(0.5)
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    torch.save(images, tmp_path / "images.pt")
    # A process that cannot import ganomaly; any number of images, one too
    code = (
        "import torch, sys; run = torch.export.load('program.pt2').module()\n"
        "images = torch.load('images.pt')\n"
        "torch.save([run(images), run(images[:1])], 'answers.pt')\n"
        "assert 'ganomaly' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for answer, part in zip(torch.load(tmp_path / "answers.pt"), (images, images[:1])):
        ours = detector(part)
        torch.testing.assert_close(answer[0], ours.scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(answer[1], ours.defective)
        torch.testing.assert_close(answer[2], detector.heat_maps(part), rtol=1e-4, atol=1e-4)
    code, _, err = script("export", "--model", model, "--output", model)
    assert code == 2 and "is the model" in one_line_error(err)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["latent", "latent_whitened", "feature"])
def test_any_score_can_be_exported(script, parts, tmp_path, score):
    assert script("train", *train_words(parts, tmp_path, f"--score={score}"))[0] == 0
    code, told, _ = script("export", "--model", folder_of(tmp_path) / "model.pt")
    assert code == 0 and f"{score} scores" in told
    assert (folder_of(tmp_path) / "model.pt2").is_file()


# benchmark.py


def benchmark_words(root, out, *more):
    return ["--experiment=all", "--data-root", root, "--experiments-dir", out, *TINY_FLAGS, *more]


@pytest.fixture(scope="module")
def fifteen(tmp_path_factory):
    root = tmp_path_factory.mktemp("mvtec")
    for i, name in enumerate(MVTEC):
        draw_category(root / name, n_train=20, n_good=2, n_bad=2, seed=i)
    return root


@pytest.mark.slow
def test_fifteen_categories_go_through_whole(script, fifteen, tmp_path):
    code, out, err = script("benchmark", *benchmark_words(fifteen, tmp_path))
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "all/results.csv").open()))
    assert [row["category"] for row in rows] == [*MVTEC, "Mean", "Mean without screw"]
    mean = np.mean([float(row["auroc"]) for row in rows[:15]])
    assert float(rows[15]["auroc"]) == pytest.approx(mean, abs=1e-5)
    assert "anomalib README" in out and "| Mean without screw |" in out and "0.421" in out
    assert out.count("seed 42: AUROC") == 15
    alone = tmp_path / "alone"
    words = train_words(fifteen, alone, category="zipper")
    assert script("train", *words, "--dataset=mvtec")[0] == 0
    assert numbers(folder_of(alone, "zipper")) == numbers(folder_of(tmp_path, "zipper", name="all"))


@pytest.mark.slow
def test_seeds_give_deviations_and_finished_runs_are_kept(script, fifteen, tmp_path):
    words = benchmark_words(fifteen, tmp_path, "--categories", "bottle", "screw")
    assert script("benchmark", *words, "--seeds", "42", "43")[0] == 0
    first = (tmp_path / "all/bottle/seed42/metrics.json").read_bytes()
    code, out, _ = script("benchmark", *words, "--seeds", "42", "43", "44")
    assert code == 0 and out.count("(done before)") == 4 and "±" in out
    assert (tmp_path / "all/bottle/seed42/metrics.json").read_bytes() == first
    names = [row["category"] for row in csv.DictReader((tmp_path / "all/results.csv").open())]
    assert names[6:] == ["Mean of 2", "Mean of 1 without screw"] * 3


def test_missing_categories_are_listed_before_any_work(script, fifteen, tmp_path):
    root = tmp_path / "some"
    shutil.copytree(fifteen / "tile", root / "tile")
    words = benchmark_words(root, tmp_path / "out", "--categories", "tile", "wood", "cable")
    code, _, err = script("benchmark", *words)
    assert code == 2 and "(wood, cable)" in one_line_error(err) and not (tmp_path / "out").exists()
    code, out, err = script("benchmark", *words, "--skip-missing")
    assert code == 1 and "skipped wood" in err and "tile seed 42: AUROC" in out


def test_a_failing_category_is_told_and_the_others_are_done(script, fifteen, tmp_path):
    root = tmp_path / "images"
    for name in ("tile", "wood"):
        shutil.copytree(fifteen / name, root / name)
    (root / "tile/train/good/000.png").write_text("no image")
    words = benchmark_words(root, tmp_path / "out", "--categories", "tile", "wood")
    code, out, err = script("benchmark", *words)
    assert code == 1 and "wood seed 42: AUROC" in out and "Traceback" not in err
    assert "failed tile seed 42: 1 image cannot be read" in err and "000.png" in err
    assert not (tmp_path / "out/all/tile").exists()


def test_one_category_or_seed_may_be_named_as_in_train(script, fifteen, tmp_path):
    words = benchmark_words(fifteen, tmp_path, "--category=tile", "--seed=7")
    assert script("benchmark", *words)[0] == 0
    found = [p.parent.parent.name + p.parent.name for p in tmp_path.glob("all/*/*/metrics.json")]
    assert found == ["tileseed7"]


def test_a_benchmark_over_all_categories_of_a_folder(script, parts, tmp_path):
    code, out, _ = script("benchmark", *benchmark_words(parts, tmp_path, "--dataset=folder"))
    assert code == 0 and "parts seed 42: AUROC" in out


# Bad input: one line, exit code 2, nothing written


def test_bad_input_is_one_line_that_names_it_and_the_mend(script, parts, tmp_path):
    empty = tmp_path / "empty"
    (empty / "parts/train/good").mkdir(parents=True)
    typo, text = tmp_path / "typo.json", tmp_path / "text.json"
    typo.write_text('{"stepz": 3}')
    text.write_bytes(b"\xff\xfe\x00")
    a_file = tmp_path / "file"
    a_file.write_text("x")
    out = tmp_path / "out"
    base = train_words(parts, out)
    model = ["--model", tmp_path / "none.pt", "--images", parts]
    table = [
        ("train", [*base, "--data-root", tmp_path / "nowhere"], "nowhere/parts/train/good"),
        ("train", [*base, "--data-root", empty], "no images"),
        ("train", [*base, "--image-size", "48"], "image_size: 48"),
        ("train", [*base, "--steps", "-5"], "steps: -5"),
        ("train", [*base, "--steps", "x"], "steps: 'x' is not a whole number"),
        ("train", [*base, "--steps"], "--steps: expected one argument"),
        ("train", [*base, "--stepz", "5"], "did you mean '--steps'"),
        ("train", [*base, "--config", typo], "did you mean 'steps'"),
        ("train", [*base, "--config", text], "text.json: not a JSON config"),
        ("train", [*base, "--config", tmp_path / "none.json"], "none.json: no such config"),
        ("train", [*base, "--experiment", "../x"], "--experiment '../x'"),
        ("train", [*base, "--category", "../parts"], "category: '../parts'"),
        ("train", [*base, "--category", "prats"], "categories there: parts"),
        ("train", [*base, "--experiments-dir", a_file], str(a_file)),
        ("train", [*base, "--device", "cuda:99"], "--device cuda:99"),
        ("train", [*base, "--device", "tpu"], "--device tpu"),
        ("train", ["--category", "bottle", "--data-root", tmp_path / "no"], "make download"),
        ("train", ["--dataset", "mnist", "--category", "3", "--data-root", empty], "--download"),
        ("benchmark", ["--recipe", "none"], "no such recipe; there:"),
        ("benchmark", ["--recipe", "../x"], "no such recipe"),
        ("benchmark", ["--seeds", "a"], "--seeds"),
        ("benchmark", ["--recipe=digits", "--categories", "3", "11"], "has no '11'"),
        ("benchmark", ["--dataset=mnist", "--data-root", empty, "--experiment=x"], "10 categories"),
        ("benchmark", ["--categories", "botle", "--data-root", parts], "botle"),
        ("evaluate", ["--experiments-dir", out], "no finished run"),
        ("predict", model, "none.pt: no such model"),
        ("predict", [], "--model"),
    ]  # fmt: skip
    for name, words, expected in table:
        code, printed, err = script(name, *words)
        assert code == 2 and printed == "", (words, err)
        assert expected in one_line_error(err)
    assert not out.exists()


def test_predict_refuses_what_is_not_there(script, parts, tmp_path):
    script("train", *train_words(parts, tmp_path))
    model = folder_of(tmp_path) / "model.pt"
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "none", "no such image"), (tmp_path / "empty", "no images")):
        code, out, err = script("predict", "--model", model, "--images", path)
        assert code == 2 and words in one_line_error(err) and out == ""


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "scripts").glob("*.py")))
def test_help_fits_a_screen(script, capsys, name):
    with pytest.raises(SystemExit):
        script(name, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) - len(FIELDS) < 39  # a line a knob, and what stands around them


def test_digits_are_the_default_and_need_nothing(script, tmp_path):
    flags = ["--steps=2", "--width=4", "--experiments-dir", tmp_path, "--download"]
    code, out, _ = script("train", *flags)
    assert code == 0 and out.startswith("0 seed 42: 1036 images trained on")


# ablate.py


@pytest.fixture
def ablate():
    return load_script("ablate")


def ablation_words(parts, tmp_path, *more):
    recipe = tmp_path / "recipe.json"
    values = {"dataset": "folder", **TINY, "corrupted": 0.5, "comparator_width": 3}
    recipe.write_text(json.dumps({**values, "normalise": "exposure", "score": "calibrated"}))
    return ["--config", recipe, "--data-root", parts, "--experiments-dir", tmp_path, *more]


def test_ablations_without_images_are_one_line(script, tmp_path):
    words = ["--categories", "bottle", "screw", "--data-root", tmp_path]
    code, _, err = script("ablate", *words, "--experiments-dir", tmp_path / "x")
    told = one_line_error(err)
    assert code == 2 and "data of 2 of 2 categories is missing (bottle, screw)" in told


def test_ablations_are_run_once_and_compared_by_seed(script, parts, tmp_path):
    some = ["--only", "base", "half the steps", "no comparator", "--seeds", 1, 2]
    code, out, err = script("ablate", *ablation_words(parts, tmp_path, *some))
    assert code == 0, err
    folder = tmp_path / "local" / "ablations-recipe"
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["ablation"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("base", "half the steps", "no comparator") for seed in ("1", "2")
    ]
    base = {row["seed"]: float(row["auroc"]) for row in rows if row["ablation"] == "base"}
    for row in rows:
        expected = float(row["auroc"]) - base[row["seed"]]
        assert float(row["difference"]) == pytest.approx(expected, abs=2e-6)
    assert rows[-1]["auroc_comparator"] == "" and rows[0]["auroc_comparator"]
    assert "| half the steps |" in out and "±" in out
    steps = json.loads((folder / "half-the-steps/parts/seed1/config.json").read_text())["steps"]
    assert steps == TINY["steps"] // 2
    before = {p: p.read_bytes() for p in folder.rglob("metrics.json")}
    assert script("ablate", *ablation_words(parts, tmp_path, *some))[0] == 0
    assert {p: p.read_bytes() for p in folder.rglob("metrics.json")} == before
    # A damaged run of before is left out and told, whatever is asked for now
    next(folder.glob("half*/parts/seed2/metrics.json")).write_text("{")
    code, out, err = script("ablate", *ablation_words(parts, tmp_path, "--only=base", "--seeds=1"))
    assert code == 0 and "warning: not in the tables: " in err
    assert len((folder / "results.csv").read_text().splitlines()) == len(rows)


def test_an_ablation_that_fails_leaves_the_others_their_runs(script, parts, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(parts / "parts", root / "whole")
    shutil.copytree(parts / "parts/train", root / "untested/train")
    words = ["--only", "base", "no encoder loss", "--categories", "untested", "whole"]
    code, out, err = script("ablate", *ablation_words(root, tmp_path, *words))
    assert code == 1 and out.count("whole seed 42: AUROC") == 2
    assert [line for line in err.splitlines() if line.startswith("failed")] == [
        f"failed {name}, untested seed 42: no test/, so nothing can be compared"
        for name in ("base", "no encoder loss")
    ]
    assert "| no encoder loss |" in out and "untested" not in out


def test_what_a_recipe_does_not_have_is_not_taken_from_it(script, parts, tmp_path):
    words = ["--data-root", parts, "--experiments-dir", tmp_path, "--recipe=paper", "--dry-run"]
    words += ["--dataset=folder", "--category=parts", "--seed=7"]
    code, out, err = script("ablate", *words)
    # Three that change nothing of the paper's recipe are left out
    assert code == 0 and out.count("parts/seed7: train") == len(out.splitlines())
    assert len(out.splitlines()) == len(load_script("ablate").ABLATIONS) - 3
    assert "images as they are, no comparator, no corruption, no comparator" in err


def test_every_ablation_changes_the_recipe_and_none_twice_alike(ablate):
    recipe = Config(
        dataset="folder", amp="bf16", corrupted=0.5, comparator_width=16, normalise="exposure",
        score="calibrated",
    )  # fmt: skip
    configs = [ablate.changed(recipe, changes) for _, changes in ablate.ABLATIONS]
    assert configs[0] == recipe and len(set(configs)) == len(configs)
    assert len({ablate.slug(name) for name, _ in ablate.ABLATIONS}) == len(configs)


def test_an_unknown_ablation_is_refused_by_name(script, parts, tmp_path):
    code, _, err = script("ablate", *ablation_words(parts, tmp_path, "--only", "no bias"))
    assert code == 2 and "there: base, no adversarial loss" in one_line_error(err)
