"""predict.py and export.py, and what --output may be."""

import csv
import fcntl
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from ganomaly import detector as detector_module
from ganomaly import load
from ganomaly.detector import Detector
from ganomaly.runs.pictures import explained

from .conftest import EVERY, ROOT, draw, folder_of, train
from .outputs import contents, printed, read_csv, read_json, refusal


@pytest.fixture
def predict(script, trained):
    """predict(images, ...) -> (exit code, rows, standard error), of the run that is trained."""

    def call(*words) -> tuple[int, list[dict], str]:
        model = folder_of(trained) / "model.pt"
        code, out, err = script("predict", "--model", model, "--images", *words)
        return code, list(csv.DictReader(io.StringIO(out, newline=""))), err

    return call


@pytest.fixture(scope="module")
def calibrated(parts, tmp_path_factory) -> Path:
    """The model of a run of every part there is."""
    more = [*EVERY, "--score=calibrated"]
    return train(parts, tmp_path_factory.mktemp("calibrated"), *more) / "model.pt"


def test_predict_gives_the_scores_of_the_run(predict, parts, trained):
    code, rows, err = predict(parts / "parts/test")
    recorded = read_csv(folder_of(trained) / "scores.csv")
    threshold = read_json(folder_of(trained) / "metrics.json")["threshold"]
    assert code == 0 and len(rows) == 9 and "9 images" in err
    assert list(rows[0]) == ["path", "score", "threshold", "verdict", "p_value"]
    for row, known in zip(rows, recorded, strict=True):
        assert row["path"].endswith(known["path"])
        assert float(row["score"]) == pytest.approx(float(known["latent"]), rel=1e-5)
        assert float(row["threshold"]) == pytest.approx(threshold, rel=1e-5)
        above = float(row["score"]) > threshold
        assert row["verdict"] == ("defective" if above else "normal")
    code, rows, _ = predict(parts / "parts/test", "--score", "contextual")
    contextual = [float(known["contextual"]) for known in recorded]
    assert code == 0 and [float(r["score"]) for r in rows] == pytest.approx(contextual, rel=1e-5)
    assert "comparator is none of" in refusal(predict(parts / "parts/test", "--score=comparator"))


def test_a_quantile_moves_the_threshold_and_says_what_it_stands_for(predict, parts):
    code, rows, err = predict(parts / "parts/test", "--quantile", "0.3")
    level = 1 - 4 / 11
    assert code == 0 and f"expected false alarms {100 * level:.2g} %" in err
    for row in rows:  # to the digits that are written
        assert (row["verdict"] == "defective") == (float(row["p_value"]) < level + 1e-3)
    line = refusal(predict(parts / "parts/test", "--quantile", "95"))
    assert "quantile: 95.0 is not allowed" in line


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    script, calibrated, parts, tmp_path, monkeypatch
):
    shutil.copytree(parts / "parts" / "test", tmp_path / "test")
    monkeypatch.setattr(detector_module, "PASS_IMAGES", 8)  # 2 with their copies
    words = ["predict", "--model", calibrated, "--images", tmp_path / "test", "--output"]
    printed(script(*words, tmp_path / "whole.csv"))
    out, part, heat = tmp_path / "a.csv", tmp_path / "a.csv.part", tmp_path / "heat"
    whole, explain, scored, sizes = (tmp_path / "whole.csv").read_bytes(), Detector.explain, [], []

    def some(n):
        def stop(detector, images):
            sizes.append(part.stat().st_size)
            scored.append(len(images))
            if len(scored) > n:
                raise KeyboardInterrupt
            return explain(detector, images)

        scored.clear()
        monkeypatch.setattr(Detector, "explain", stop)
        return script(*words, out, "--heatmaps", heat)

    code, _, err = some(3)
    assert code == 130 and "the same command goes on" in err and not out.exists()
    assert part.read_text().splitlines()[1:] == whole.decode().splitlines()[1:7]
    part.write_bytes(part.read_bytes()[:-3])  # killed while it wrote: the last batch is lost
    code, _, err = some(9)
    assert (code, sum(scored)) == (0, 5) and "going on after 4 of 9 images" in err
    assert sizes[4] == sizes[2] > sizes[0]  # a kill there would not lose the rows
    assert out.read_bytes() == whole and not part.exists() and len(list(heat.rglob("*.png"))) == 9
    with open(part, "a") as other:  # another process writes there
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is writing" in refusal(some(9))
    some(3)  # a finished run starts anew
    shutil.rmtree(heat)  # and with it the pictures of the earlier rows
    assert "going on after 0 of 9 images" in some(3)[2]
    calibrated.touch()  # as if the model were another one
    assert "going on after 0 of 9 images" in some(3)[2]
    # Another folder takes the place of the first images. Its files are older than the rows
    (tmp_path / "test/a_bar").rename(tmp_path / "old")
    (tmp_path / "test/good").rename(tmp_path / "test/a_bar")
    (tmp_path / "old").rename(tmp_path / "test/good")
    assert some(9)[0] == 0 and sum(scored) == 9 and out.read_bytes() != whole


def test_a_page_has_the_most_anomalous_images_first(predict, parts, trained, tmp_path):
    page = tmp_path / "page.html"
    code, rows, err = predict(parts / "parts/test", "--report", page)
    text = page.read_text()
    assert code == 0 and f"page {page}" in err and text.count("data:image/jpeg;base64,") == 9
    rows.sort(key=lambda row: -float(row["score"]))
    places = [text.index(row["path"] + ": " + row["verdict"]) for row in rows]
    assert places == sorted(places) and "9 images: " in text
    assert f"p-value {rows[0]['p_value']}" in text
    assert "--report" in refusal(predict(parts / "parts/test", "--report", tmp_path))
    same = ["--report", tmp_path / "x", "--output", tmp_path / "x"]
    assert "is the --output too" in refusal(predict(parts / "parts/test", *same))


def test_a_defective_image_has_heat_and_a_normal_one_may_have():
    image, flat = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((8, 8), -30.0)
    flat[2, 2] = -2.0
    for heat, defective, coloured in (
        (flat, True, True), (flat, False, False), (flat + 4, False, True), (flat + 4, True, True),
    ):  # fmt: skip
        picture = np.asarray(explained(image, image, heat, defective)).astype(int)
        assert picture[:, 512:].any() == coloured
        assert (picture[:, 512:].max(2) > 0).mean() < 0.2
    captioned = explained(image, image, flat, False, "normal: score 1")
    assert np.asarray(captioned)[200:, 512:].any() and captioned.size == (768, 256)


def test_calibrate_learns_the_threshold_again(script, calibrated, parts, tmp_path):
    good, output = tmp_path / "good", tmp_path / "new.pt"
    for i in range(20):
        draw(good / f"{i}.png", np.random.default_rng(100 + i))
    words = ["calibrate", "--model", calibrated, "--quantile=.97", "--score=contextual"]
    out = printed(script(*words, "--images", good, "--output", output))
    model, before = load(output, "cpu"), load(calibrated, "cpu")
    assert len(model.normal) == 20 and model.config.score == "contextual"
    assert model.threshold == float(model.normal[-1]) != before.threshold
    assert "of these 20 images are above the threshold" in out and "now: 0 of these" in out
    assert "4.8 % (from 20 held-out images); 3 % was asked for, which needs 33 images" in out
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model.scores(images)["latent"], before.scores(images)["latent"])
    assert model(sorted(good.glob("*.png"))).defective.sum() == 0
    some = [good, *sorted(good.glob("*.png"))[:8]]  # copies do not count
    code, out, err = script(*words, "--images", *some, "--output", output)
    assert code == 0 and "(from 20 held-out" in out and "8 copies of others are left out" in err
    ours, theirs = (one.normal_scores["calibrated"] for one in (model, load(output, "cpu")))
    assert torch.equal(ours, theirs)  # in whatever order the images came
    line = refusal(script(*words, "--images", *some[1:], *some[1:], "--output", output))
    assert "8 images; at least 10 are needed" in line
    # Scores of images that were trained on are too low, so these do not count either
    used = parts / "parts" / "train" / "good"  # 24 images, of which ten were held out
    code, out, err = script(*words, "--no-tta", "--images", good, used, "--output", output)
    assert code == 0 and "(from 30 held-out" in out and before.config.tta
    assert not load(output, "cpu").config.tta
    assert "14 images that the model was trained on are left out" in err
    assert repr(model).count("\n") < 4 and len(repr(model)) < 300


def test_paths_come_from_patterns_and_pipes_in_their_order(predict, parts, tmp_path, monkeypatch):
    def piped(content: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return predict("-")

    test = parts / "parts" / "test"
    code, rows, _ = predict(test / "**" / "00[12].png")
    expected = [str(test / d / f"00{i}.png") for d in ("a_bar", "good") for i in (1, 2)]
    assert code == 0 and [row["path"] for row in rows] == expected
    image = test / "good" / "003.png"
    lines = [str(path) for path in (image, test / "gone.png", test / "a_bar", image)]
    code, rows, err = piped("\n".join(lines).encode())
    assert code == 1 and [row["path"] for row in rows] == lines and "2 unreadable" in err
    assert rows[0]["score"] == rows[3]["score"] and rows[1]["score"] == ""
    assert "No such file" in rows[1]["verdict"] and "directory" in rows[2]["verdict"]
    code, rows, _ = piped("\ufeffa\x0cb.png\r\nc\u2028d.png\r".encode())
    assert [row["path"] for row in rows] == ["a\x0cb.png", "c\u2028d.png"]
    assert "'-': there is no image" in refusal(piped(b"\n"))
    assert "-print0" in refusal(piped(b"a.png\0b.png\0"))
    (tmp_path / "empty").mkdir()
    for path in (test / "*.tif", tmp_path / "none", "", tmp_path / "empty"):
        assert f"'{path}': there is no image" in refusal(predict(path))


def test_heat_maps_keep_relative_paths_and_one_scale(predict, parts, tmp_path):
    shutil.copytree(parts / "parts/test", test := tmp_path / "test")
    heat = tmp_path / "heat"
    code, _, err = predict(test, "--heatmaps", heat)
    assert code == 0 and f"heat maps in {heat}" in err
    names = {path.relative_to(test) for path in test.rglob("*.png")}
    assert {path.relative_to(heat) for path in heat.rglob("*.png")} == names
    with Image.open(heat / "a_bar" / "000.png") as picture:
        assert picture.size == (768, 256)
        left = np.asarray(picture)[:, :256].astype(int)
    with Image.open(test / "a_bar" / "000.png") as image:
        assert abs(left - np.asarray(image.resize((256, 256), 2)).astype(int)).max() <= 1


def test_no_heat_map_falls_on_an_image_or_on_another_heat_map(predict, parts, tmp_path):
    test, mine = shutil.copytree(parts / "parts/test", tmp_path / "test"), tmp_path / "mine"
    shutil.copytree(test / "good", mine / "good")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for images, folder, message in (
        ([test], test, "in a folder of images"),
        ([test], test / "heat", "in a folder of images"),
        ([test / "*/*.png"], test, "holds images to score"),
        ([test], mine, "holds other files"),
        ([test / "good", test / "a_bar"], tmp_path / "heat", "score them apart"),
    ):
        assert message in refusal(predict(*images, "--heatmaps", folder))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_predict_waits_for_no_import_that_it_does_not_need(calibrated, parts, tmp_path):
    words = [sys.executable, "-X", "importtime", ROOT / "scripts/predict.py", "--model", calibrated]
    words += ["--images", parts / "parts/test", "--heatmaps", tmp_path / "maps"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and "PIL.Image" in imported
    assert not {"sklearn", "scipy", "torchvision", "tensorboard"} & imported


def test_an_output_spares_the_inputs(script, finished, parts, tmp_path, monkeypatch):
    model, before = finished / "model.pt", contents(finished)
    image = shutil.copy(parts / "parts/test/good/000.png", tmp_path)
    words = ["predict", "--model", model, "--images", image, "--output"]
    for bad in (model, image, tmp_path):
        assert "--output" in refusal(script(*words, bad))
    words[2] = finished  # a run's folder stands for its model.pt
    assert "is an input" in refusal(script(*words, model))
    same = shutil.copy(model, tmp_path / "same.pt2")
    assert "is an input" in refusal(script("export", "--model", same, "--output", same))
    assert contents(finished) == before
    assert "latent scores" in printed(script("export", "--model", model))  # without a comparator
    assert (finished / "model.pt2").is_file()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert "cannot be written" in refusal(script(*words, tmp_path / "closed" / "a.csv"))


@pytest.mark.parametrize("command", ["predict", "report"])
def test_an_output_goes_through_links_and_pipes(script, finished, parts, tmp_path, command):
    words = {
        "predict": ["--model", finished / "model.pt", "--images", parts / "parts/test"],
        "report": ["--experiments-dir", tmp_path, "--experiment", "local"],
    }[command]
    target, link, fifo, read = (tmp_path / name for name in ("target", "link", "fifo", "read"))
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(fifo)
    printed(script(command, *words, "--output", link))
    assert link.is_symlink() and target.stat().st_size > 400
    with open(read, "wb") as file:
        reader = subprocess.Popen(["timeout", "30", "cat", fifo], stdout=file)
    printed(script(command, *words, "--output", fifo))
    assert fifo.is_fifo() and reader.wait() == 0
    assert target.read_bytes() == read.read_bytes()
    assert "/dev/full: No space left" in refusal(script(command, *words, "--output", "/dev/full"))


@pytest.mark.slow
def test_a_full_disk_under_standard_output_is_one_line(trained, parts):
    words = ["--model", folder_of(trained) / "model.pt", "--images", parts / "parts" / "test"]
    with open("/dev/full", "w") as full:
        run = [sys.executable, ROOT / "scripts/predict.py", *words]
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr.splitlines()[-1]
    assert "Exception" not in done.stderr


@pytest.mark.slow
def test_an_exported_program_says_the_same_without_this_repository(calibrated, tmp_path):
    # The real process: what it imports while it traces must not end in the program
    words = ["--model", calibrated, "--output", tmp_path / "program.pt2", "--quantile", "0.5"]
    words = [sys.executable, ROOT / "scripts/export.py", *words]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "expected false alarms 45 %" in done.stdout
    assert str(ROOT).encode() not in (tmp_path / "program.pt2").read_bytes()
    detector = load(calibrated, "cpu")
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
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for answer, part in zip(torch.load(tmp_path / "answers.pt"), (images, images[:1])):
        ours = detector(part)
        torch.testing.assert_close(answer[0], ours.scores, rtol=1e-5, atol=1e-6)
        assert torch.equal(answer[1], ours.defective)
        torch.testing.assert_close(answer[2], detector.heat_maps(part), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_onnx_file_says_the_same_or_is_not_written(script, calibrated, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is optional")
    pytest.importorskip("onnxscript", reason="onnxscript is optional")
    words = ["--model", calibrated, "--output", tmp_path / "model.onnx"]
    command = [sys.executable, ROOT / "scripts/export.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    content = (tmp_path / "model.onnx").read_bytes()
    assert str(ROOT).encode() not in content
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    detector = load(calibrated, "cpu")
    for n in (1, 7):
        images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
        names = ["scores", "heat_maps", "defective"]
        *theirs, defective = session.run(names, {"images": images.numpy()})
        for a, b in zip((detector(images).scores, detector.heat_maps(images)), theirs, strict=True):
            assert a.shape == b.shape and abs(a.numpy() - b).max() <= 1e-4 * a.abs().max()
        assert defective.tolist() == detector(images).defective.tolist()
    (tmp_path / "model.onnx").unlink()
    again = Mock(**{"return_value.model_proto.SerializeToString.return_value": content})
    monkeypatch.setattr(torch.onnx, "export", again)  # to save half a minute
    monkeypatch.setattr(Detector, "heat_maps", lambda _, images: images[:, 0].float())
    assert "name a .pt2 file" in refusal(script("export", *words))
    assert not list(tmp_path.iterdir())


def test_export_refuses_another_suffix_and_missing_packages(script, tmp_path, monkeypatch):
    words = ["export", "--model", tmp_path / "model.pt", "--output"]
    line = refusal(script(*words, tmp_path / "model.bin"))
    assert ".pt2" in line and ".onnx" in line
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = refusal(script(*words, tmp_path / "model.onnx"))
    assert "needs onnx, onnxscript, onnxruntime: pip install" in line
    assert not list(tmp_path.iterdir())
