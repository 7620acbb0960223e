"""Tables of what people and disks do to files: each is one row or one line, never a traceback."""

import io
import os

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from .conftest import EVERY, folder_of, train_words
from .outputs import numbers, printed, read_csv, refusal


def noise(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)


def packed(kind: str, image: Image.Image | None = None, **save) -> bytes:
    """A file of an image, else of noise."""
    buffer = io.BytesIO()
    (image or Image.fromarray(noise())).save(buffer, kind, **save)
    return buffer.getvalue()


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"  # nonsense
NOTES = PngImagePlugin.PngInfo()
NOTES.add_text("report", "x" * 3_000_000, zip=True)
RAMP = np.arange(1600).reshape(40, 40)
GREY_16 = Image.fromarray(RAMP.astype(np.uint16))
MORE = dict(save_all=True, append_images=[Image.new("RGB", (40, 40))])
# name, content, what its row says: a part of the reason, or None where it is read
IMAGES = [
    ("zero.png", b"", "no image of a format"),
    ("text.png", b"hello", "no image of a format"),
    ("print.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no image"),
    ("cut.png", packed("png")[:900], "truncated"),
    ("zeros.png", packed("png")[:4000] + bytes(1000), "IDAT"),
    ("cut.webp", packed("webp")[:300], ""),
    ("crc.png", packed("png").replace(b"IDAT", b"IDAX", 1), ""),
    ("too_large.png", packed("png", Image.new("RGB", (100, 100))), "exceeds limit"),
    ("float.tif", packed("tiff", Image.fromarray(RAMP.astype(np.float32))), "32-bit"),
    ("negative.tif", packed("tiff", Image.fromarray(RAMP.astype(np.int32) - 800)), "32-bit"),
    ("wide.tif", packed("tiff", Image.fromarray(RAMP.astype(np.int32) + 70_000)), "32-bit"),
    ("inverted.tif", packed("tiff", GREY_16, tiffinfo={262: 0}), "white is 0"),
    ("moving.webp", packed("webp", **MORE), None),
    ("really_a_gif.png", packed("gif", **MORE), None),
    *((name, packed("png"), None) for name in (
        "UPPER.PNG", "comma, 'quotes\".png", "new\nline.png", "-flag.png", "\u6587\u5b57.png",
        os.fsdecode(b"latin\xe9.png"), "linked/a.jfif", "b.pgm", "c.GIF",
    )),
    ("turned.jpg", packed("jpeg", exif=EXIF), None),
    ("long_notes.png", packed("png", pnginfo=NOTES), None),
    ("cut_exif.png", packed("png", exif=b"Exif\0\0MM\0*\0\0"), None),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # as images.py does outside of pytest
def test_every_image_is_a_row_whatever_is_in_it(script, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # Pillow raises at twice as many
    folder = tmp_path / "parts/train/good"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    for name, content, _ in IMAGES:
        (folder / name).write_bytes(content)
    # What is no file is passed over: pipes, folders, links that lead in a circle
    (folder / "up").symlink_to(folder)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / ".hidden.png").write_bytes(b"")
    output, model = tmp_path / "out.csv", folder_of(trained) / "model.pt"
    words = ["--model", model, "--images", folder, "--output", output]
    code, _, err = script("predict", *words)
    assert code == 1 and "Traceback" not in err and f"{len(IMAGES)} images" in err
    assert "1 of 14 images have damaged metadata" in err
    rows = {row["path"].removeprefix(f"{folder}/"): row for row in read_csv(output)}
    assert rows.keys() == {name for name, *_ in IMAGES}
    for name, _, reason in IMAGES:
        if reason is None:
            assert float(rows[name]["score"]) >= 0, name
        else:
            assert rows[name]["verdict"].startswith("unreadable: "), name
            assert reason in rows[name]["verdict"] and "\n" not in rows[name]["verdict"], rows[name]
    # The same ones to train on. A link that leads nowhere has a line of its own
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    code, _, err = script("train", *train_words(tmp_path, tmp_path / "runs"))
    assert code == 2 and "circle.png: Too many levels of symbolic links" in err
    for name in ("dangling.png", "circle.png"):
        (folder / name).unlink()
    (folder / "folder.png").rmdir()
    bad = [name for name, _, reason in IMAGES if reason is not None]
    code, _, err = script("train", *train_words(tmp_path, tmp_path / "runs"))
    line = next(x for x in err.splitlines() if x.startswith("error: "))
    assert code == 2 and f"{len(bad)} of {len(IMAGES)} images cannot be read" in line
    assert all(name in line for name in bad) and not list((tmp_path / "runs").rglob("*.json"))


def test_a_damaged_run_is_made_whole_or_refused(script, parts, finished, tmp_path):
    words, whole = train_words(parts, tmp_path), numbers(finished)
    metrics, checkpoint = finished / "metrics.json", finished / "last.pt"
    os.truncate(metrics, 100)
    assert "not a complete metrics.json" in refusal(script("train", *words))
    metrics.unlink()
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 64  # one bit in the middle of the weights
    checkpoint.write_bytes(content)
    line = "last.pt: damaged; remove it, and training starts anew"
    assert line in refusal(script("train", *words))
    for gone in (checkpoint, finished / "model.pt"):
        gone.unlink()
        printed(script("train", *words))
        assert numbers(finished) == whole


BLACK = np.zeros((40, 40, 3), np.uint8)
# Images to train on, good and defective ones to test
ODD_SETS = {
    "all black": ([BLACK] * 24, [BLACK] * 4, [BLACK] * 4),
    "identical": ([noise(0)] * 24, [noise(0)] * 4, [noise(i) for i in range(1, 5)]),
    "one of each": ([noise(i) for i in range(24)], [noise(30)], [BLACK]),
}


@pytest.mark.parametrize("more", [[], [*EVERY, "--score=spot_or_area"]], ids=["paper", "ours"])
@pytest.mark.parametrize("name", ODD_SETS)
def test_odd_sets_have_defined_results_and_no_warning(script, tmp_path, name, more):
    for place, arrays in zip(("train/good", "test/good", "test/bad"), ODD_SETS[name]):
        folder = tmp_path / "images" / "parts" / place
        folder.mkdir(parents=True)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(folder / f"{i:03}.png")
    code, out, err = script("train", *train_words(tmp_path / "images", tmp_path, *more))
    assert code == 0 and "nan" not in out.lower() and "Warning" not in err, err
    metrics, scores = numbers(folder_of(tmp_path))
    figures = [v for v in metrics.values() if type(v) in (int, float)]
    assert np.isfinite([*figures, *metrics["scores"].values()]).all() and "nan" not in scores
    if name == "all black":  # nothing to tell them apart by
        assert set(metrics["scores"].values()) == {0.5}
        assert metrics["auroc"] == metrics["auroc_pca"] == metrics["auroc_brightness"] == 0.5
