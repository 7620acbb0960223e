"""Images and masks that would mislead in silence: what is read, and what is said of it."""

import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ganomaly import data, load
from ganomaly.images import read_image
from ganomaly.paths import find_images
from ganomaly.runs.evaluation import pixel_figures

from .conftest import ROOT, add_masks, draw, draw_category, folder_of, train, train_words
from .outputs import read_csv
from .test_data import folder


@pytest.fixture
def said(capsys):
    """said(root) -> the category `parts` there, and what was printed about it."""

    def load_category(root, **values):
        category = data.load(folder(**values), root)
        return category, capsys.readouterr().err

    return load_category


def every_image(folder):
    return sorted(folder.rglob("*.png"))


def write_png16(path, levels: np.ndarray, kind: int = 2) -> None:
    """A PNG of 16 bits, which Pillow cannot write: 2 colour, 6 with alpha, 4 grey with alpha."""
    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("bits", (8, 10, 12, 14, 16))
@pytest.mark.parametrize("colour", (True, False))
def test_a_camera_of_fewer_bits_is_read_at_its_full_range(tmp_path, said, bits, colour):
    root = draw_category(tmp_path / "parts", n_good=1, n_bad=1)
    expected, _ = said(tmp_path, channels=3 if colour else 1)
    white = 2**bits - 1
    for path in every_image(root):
        with Image.open(path) as image:
            eight = np.asarray(image if colour else image.convert("L")).astype(np.int64)
        levels = ((eight * white + 127) // 255).astype(np.uint16)
        write_png16(path, levels) if colour else Image.fromarray(levels).save(path)
    category, err = said(tmp_path, channels=3 if colour else 1)
    assert category.kind.full_scale == white and "note" not in err
    for name in ("train", "calibration", "test"):
        difference = getattr(category, name).int() - getattr(expected, name).int()
        assert difference.abs().max() <= 1


def test_an_opaque_alpha_channel_counts_as_no_level_and_a_colour_as_no_alpha(tmp_path):
    levels = np.linspace(0, 4095, 40 * 40 * 4).reshape(40, 40, 4).astype(np.uint16)
    write_png16(tmp_path / "a.png", levels[..., :3])
    levels[..., 3] = 65_535
    write_png16(tmp_path / "b.png", levels, kind=6)
    read = [read_image(tmp_path / f"{name}.png", 32, 3, 4095) for name in "ab"]
    (plain, facts), (alpha, same) = read
    assert facts == same and np.array_equal(plain, alpha) and facts.brightest <= 4095
    write_png16(tmp_path / "c.png", levels[..., 2:], kind=4)
    assert "too few for this camera; save as PNG" in read_image(tmp_path / "c.png", 32, 3)
    Image.new("LAB", (40, 40)).save(tmp_path / "d.tif")  # its last channel is a colour
    assert read_image(tmp_path / "d.tif", 32, 3)[1].notes == ()


def test_a_model_keeps_the_range_and_tells_of_brighter_images(tmp_path, script):
    root = draw_category(tmp_path / "images" / "parts")
    for path in every_image(root):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L")).astype(np.uint16)
        Image.fromarray(grey * 16).save(path)
    model = train(tmp_path / "images", tmp_path, "--channels=1") / "model.pt"
    detector = load(model.parent, "cpu")  # a run's folder
    test = every_image(root / "test")
    assert detector.kind.full_scale == 4095
    recorded = [float(row["latent"]) for row in read_csv(model.parent / "scores.csv")]
    assert detector(test).scores.tolist() == pytest.approx(recorded, rel=1e-5)
    Image.fromarray(np.full((40, 40), 60_000, np.uint16)).save(tmp_path / "bright.png")
    _, _, err = script("predict", "--model", model, "--images", tmp_path / "bright.png", *test)
    assert "1 of 10 images are brighter than 4095" in err and "first: " in err


@pytest.mark.parametrize(
    "how",
    [
        dict(name="{}.bmp"), dict(name="{}_mask.PNG"), dict(name="{}_GT.png"), dict(white=1),
        dict(name="{}_mask.jpg"), dict(name="{}.webp"), dict(name="{}/000.png"), dict(top="masks"),
        dict(size=(80, 80)), dict(white=60_000), dict(alpha=True), dict(white=np.arange(1, 41)),
    ],
    ids=str,
)  # fmt: skip
def test_masks_are_found_and_mean_the_same(tmp_path, said, how):
    root = draw_category(tmp_path / "parts", n_bad=2)
    category, err = said(tmp_path)
    assert category.test_masks is None and not err
    add_masks(root)
    expected = said(tmp_path)[0].test_masks
    bars = category.test[:, 0] > 180  # 250 on 60 or 140; half of a pixel is enough
    assert expected.dtype == torch.bool and (expected != bars).float().mean() < 0.003
    shutil.rmtree(root / "ground_truth")
    add_masks(root, **how)
    category, err = said(tmp_path)
    soft = how.get("name") in ("{}_mask.jpg", "{}.webp")
    assert not err and (category.test_masks != expected).float().mean() <= (0.003 if soft else 0)


def test_inverted_masks_and_defects_that_are_too_thin_are_told(tmp_path, said, capsys):
    root = draw_category(tmp_path / "parts", n_bad=2)
    add_masks(root)
    first, second = every_image(root / "ground_truth")
    with Image.open(first) as mask:
        Image.fromarray(255 - np.asarray(mask)).save(first)
    thin = np.zeros((400, 400), np.uint8)
    thin[7] = 1
    Image.fromarray(np.stack([0 * thin, 0 * thin, thin], 2)).save(second)  # dark blue
    _, err = said(tmp_path)
    assert "1 of 2 masks mark more than half of the image; are they inverted?" in err
    assert "1 of 2 masks mark nothing at 32 px, as the defects are too thin" in err
    shutil.copy(second, first)
    category, _ = said(tmp_path)
    assert pixel_figures(None, category) == {}


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda mask: Image.new("L", (40, 40)).save(mask), "000_mask.png is empty"),
        (lambda mask: Image.new("L", (60, 40), 255).save(mask), "000_mask.png has 60x40 pixels"),
        (lambda mask: mask.write_bytes(mask.read_bytes()[:40]), "000_mask.png: "),
        (lambda mask: mask.unlink(), "no file with its name"),
    ],
)
def test_a_mask_that_cannot_be_right_is_told_and_gives_no_figure(tmp_path, said, spoil, reason):
    root = draw_category(tmp_path / "parts", n_bad=2)
    add_masks(root)
    spoil(root / "ground_truth" / "a_bar" / "000_mask.png")
    category, err = said(tmp_path)
    assert category.test_masks is None
    assert "1 of 2 defective images have no usable mask in ground_truth/" in err
    assert f"a_bar/000.png ({reason}" in err


def test_sub_folders_are_read_and_what_is_left_out_is_told(tmp_path, said, monkeypatch):
    root = draw_category(tmp_path / "parts", n_bad=3)
    add_masks(root)
    for top in ("train/good", "test/a_bar", "ground_truth/a_bar"):
        (root / top / "day2").mkdir()
        for path in every_image(root / top)[:1]:
            path.rename(root / top / "day2" / path.name)
    good = root / "train" / "good"
    for thumbnails in ("@eaDir", "__MACOSX", ".cache"):
        shutil.copytree(root / "test", good / thumbnails)
        shutil.copytree(root / "test" / "good", root / "test" / thumbnails)
    shutil.copytree(root / "test" / "good", root / "test" / "good" / "more")
    for name, place in (("a.png", "test"), ("b.png", "test"), ("c.png", "validation/good")):
        draw(root / place / name, np.random.default_rng(5))
    for path in ("train/good/x.HEIC", "train/good/._000.png", "train/good/Thumbs.db", "test/a.txt"):
        (root / path).write_text("x")
    (root / "test" / "empty").mkdir()
    (good / "day3").mkdir()
    scandir = os.scandir

    def closed(place):
        if os.path.basename(place) == "day3":
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)  # root may read every folder
    found = find_images(str(good))
    assert len(found) == 25 and (str(good / "day3"), "day3") in found
    category, err = said(tmp_path)
    assert (len(category.train) + len(category.calibration), len(category.test)) == (24, 11)
    assert category.test_defects.count("a_bar") == 3 and category.test_masks is not None
    assert "test/a_bar/day2/000.png" in category.test_paths
    assert set(category.test_defects) == {"a_bar", "good"}
    reasons = "folder train/good/day3 that cannot be read", ".heic (convert them to png)"
    assert f"2 in test, {', '.join(f'1 {reason}' for reason in reasons)}, 1 in validation" in err
    assert "eaDir" not in err and "MACOSX" not in err


def test_pages_alpha_copies_and_metadata_are_told(tmp_path, said):
    root = draw_category(tmp_path / "parts")
    good, (first, second, third, *_) = root / "train/good", every_image(root / "train/good")
    for copy in (good / "copy.png", root / "test/good/copy.png"):
        shutil.copy(third, copy)
    with Image.open(first) as image, Image.open(second) as other:
        image.save(good / "pages.tif", save_all=True, append_images=[other])
        clear = image.convert("RGBA")
    clear.putalpha(image.convert("L"))
    clear.save(first)
    category, err = said(tmp_path)
    assert "2 of 26 training images are copies of others" in err  # one is of a page
    assert "1 of 36 images have several pages, of which the first is read" in err
    assert f"the colours under them count, though hidden; the first: {first}" in err
    assert "1 of 10 test images are training images too; the first: test/good/copy.png" in err


def test_another_kind_of_image_is_told_once(tmp_path, trained, parts, capsys):
    detector, test = load(folder_of(trained)), every_image(parts / "parts" / "test")
    detector(test)
    assert not capsys.readouterr().err
    for i, path in enumerate(test[:3]):
        with Image.open(path) as image:
            wide = image.resize((80, 40))
        wide = np.asarray(wide) * [1, 0.2, 0.2]
        Image.fromarray(wide.astype(np.uint8)).save(tmp_path / f"{i}.png")
    detector([*every_image(tmp_path), *test])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("note: 3 of 12 images") for line in lines)
    assert "are in colour, the training images are grey" in lines[0]
    assert "another width / height than the training images (1.00)" in lines[1]
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(tmp_path / "0.png")
    detector([tmp_path / "0.png"])
    assert "1 of 1 images have 16 bits, the training images have 8" in capsys.readouterr().err


def test_a_name_at_the_limit_loses_no_verdict(tmp_path, trained, parts, script):
    test = parts / "parts" / "test" / "good"
    (tmp_path / "new").mkdir()
    for name in ("a" * 251 + ".png", "b" * 251 + ".bmp"):
        with Image.open(test / "000.png") as image:
            image.save(tmp_path / "new" / name)
    words = ["--images", tmp_path / "new", "--heatmaps", tmp_path / "heat"]
    code, out, err = script("predict", "--model", folder_of(trained) / "model.pt", *words)
    assert code == 0 and len(out.splitlines()) == 3
    assert "1 of 2 images have a name that is too long for a heat map" in err
    assert len(every_image(tmp_path / "heat")) == 1


@pytest.mark.slow
def test_closed_streams_harm_no_result(tmp_path, trained, parts):
    first, again = tmp_path / "a.csv", tmp_path / "b.csv"
    words = [sys.executable, ROOT / "scripts/predict.py", "--images", parts / "parts/test"]
    words += ["--model", folder_of(trained) / "model.pt", "--output"]
    printed = subprocess.run([*words, first], capture_output=True, text=True, check=True).stderr
    for closing in ("2>&-", ">&-", "<&-", "<&- >&-", "<&- >&- 2>&-"):
        line = f"{shlex.join(map(str, words))} {again} {closing}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, ""), closing
        assert done.stderr == ("" if "2>" in closing else printed.replace("a.csv", "b.csv"))
        assert again.read_bytes() == first.read_bytes()
        again.unlink()


@pytest.mark.slow
def test_a_terminal_that_is_gone_stops_no_training(tmp_path, trained, parts):
    reader, terminal = pty.openpty()
    words = [sys.executable, ROOT / "scripts/train.py", *train_words(parts, tmp_path)]
    run = subprocess.Popen(words, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.close(reader)
    assert run.wait() == 0
    for name in ("scores.csv", "curve.csv"):
        assert (folder_of(tmp_path) / name).read_bytes() == (folder_of(trained) / name).read_bytes()
