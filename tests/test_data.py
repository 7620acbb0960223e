import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ganomaly import data, paths
from ganomaly.batches import fitted_scale, to_input
from ganomaly.config import Config, resolve
from ganomaly.errors import UserError
from ganomaly.images import read_image

from .conftest import CPU, add_masks, draw, draw_category


def folder(category="parts", **values) -> Config:
    return resolve({"dataset": "folder", "category": category, "image_size": 32, **values})


@pytest.mark.parametrize("channels", (1, 3))
def test_every_suffix_is_read(tmp_path, channels):
    expected = [124] if channels == 1 else [200, 100, 50]  # ITU-R 601: .299 R + .587 G + .114 B
    for suffix in paths.SUFFIXES:
        path = tmp_path / f"image{suffix}"
        Image.new("RGB", (50, 30), (200, 100, 50)).save(path)
        pixels, _ = read_image(path, 32, channels)
        assert pixels.shape == (channels, 32, 32) and pixels.dtype == np.uint8
        assert np.abs(pixels.mean((1, 2)) - expected).max() < 3
    assert len(paths.image_files(tmp_path)) == len(paths.SUFFIXES)


def grey(mode: str) -> Image.Image:
    """A picture that is black left and white right, in any mode."""
    ramp = np.zeros((40, 40), np.uint8)
    ramp[:, 20:] = 255
    if mode.startswith("I;16"):
        wide = ramp.astype(np.uint16) * 257
        return Image.fromarray(wide.byteswap().view(">u2") if mode == "I;16B" else wide)
    if mode == "I":
        return Image.fromarray(ramp.astype(np.int32) * 257)
    if mode == "transparent":  # a palette
        image = grey("RGB").quantize(4)
        image.info["transparency"] = bytes([255, 255, 128, 255])
        return image
    return Image.fromarray(ramp).convert(mode)


MODES = [
    ("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("I;16", "png"),
    ("I;16B", "tif"), ("I", "tif"), ("CMYK", "jpg"), ("transparent", "png"),
]  # fmt: skip


@pytest.mark.parametrize("mode, suffix", MODES)
@pytest.mark.parametrize("channels", (1, 3))
def test_every_mode_is_read_at_its_full_range_without_a_warning(tmp_path, mode, suffix, channels):
    path = tmp_path / f"image.{suffix}"
    grey(mode).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, _ = read_image(path, 32, channels)
    assert pixels[:, :, :10].max() < 10 and pixels[:, :, -10:].min() > 245


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90 degrees clockwise to show
    for name, white, depth in (("a.jpg", 255, np.uint8), ("a.tif", 255, np.uint8),
                               ("b.tif", 65_535, np.uint16)):  # fmt: skip
        upright = np.kron([[0, white], [0, 0]], np.ones((20, 30)))
        Image.fromarray(np.rot90(upright).astype(depth)).save(tmp_path / name, exif=exif)
        pixels = read_image(tmp_path / name, 32, 1)[0][0]
        assert pixels[5:10, 22:27].mean() > 240 and pixels[22:27].mean() < 15, name


def test_labels_come_from_the_name_good(tmp_path):
    # `a_bar` sorts before `good` and `z_bar` after it: no order may decide.
    draw_category(tmp_path / "parts", n_good=3, n_bad=2, defects=("a_bar", "z_bar"))
    for channels in (1, 3):
        c = data.load(folder(channels=channels), tmp_path)
        for part, n in ((c.train, 14), (c.calibration, 10), (c.test, 7)):
            assert part.shape == (n, channels, 32, 32) and part.dtype == torch.uint8
    # One tensor: no part is a copy
    assert len({p.untyped_storage().data_ptr() for p in (c.train, c.calibration, c.test)}) == 1
    assert c.test_labels.tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert c.test_defects == ["a_bar"] * 2 + ["good"] * 3 + ["z_bar"] * 2
    assert c.test_paths == sorted(c.test_paths) and c.test_paths[2] == "test/good/000.png"


def test_calibration_images_are_drawn_by_the_seed_and_not_trained_on():
    splits = [data.split_calibration(24, folder(seed=seed), "parts") for seed in (1, 1, 2)]
    (kept, held_out), (_, again), (_, other) = splits
    assert torch.equal(held_out, again) and not torch.equal(held_out, other)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(24))


def test_sets_that_cannot_work_are_refused(tmp_path):
    for counts, words in (
        (dict(n_good=0), "images are needed in test/good"),
        (dict(n_bad=0, defects=()), "images are needed in .* test/<defect>"),
        (dict(n_train=0), "no images in .*train/good"),
        (dict(n_train=19), "19 training images.*calibration takes 10, training needs 10"),
    ):
        root = draw_category(tmp_path / words / "parts", **counts)
        (root / "train" / "good").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match=words):
            data.load(folder(), root.parent)


def test_missing_data_names_the_folder_and_what_is_there_or_the_mend(tmp_path):
    draw_category(tmp_path / "set" / "bottle")
    shutil.copytree(tmp_path / "set", tmp_path / "stray")
    draw(tmp_path / "stray" / "a.png", np.random.default_rng(0))
    # A folder of folders of photographs has no train/good at all
    shutil.copytree(tmp_path / "set/bottle/train/good", tmp_path / "photographs" / "caps")
    bottle, three, typo = (resolve({"category": name}) for name in ("bottle", "3", "botle"))
    for config, place, words in (
        (bottle, "none", f"no images in {tmp_path}/none/bottle/train/good.*make downl"),
        (three, "none", "--dataset names another"),
        (typo, "none", "needs one of bottle, .*, not botle"),
        (resolve({"dataset": "mnist", "category": "3"}), "none", "--download .*fetches it"),
        (folder(None), "set", "there: bottle; choose one with --category .CATEGORY=."),
        (folder("screw"), "set", "categories there: bottle; choose one"),
        (folder("screw"), "stray", "categories there: bottle; choose one"),
        (folder("bottle"), "set/bottle", "category itself: .* --data-root .*/set$"),
        (folder(None), "photographs", "categories there: caps; choose one"),
    ):
        with pytest.raises(UserError, match=words):
            data.load(config, tmp_path / place)
    assert not (tmp_path / "none").exists()
    for place, expected in (("photographs", "caps"), ("photographs/caps", None), ("set", "bottle")):
        assert data.categories_of(folder(None), tmp_path / place) == [expected]


def test_a_plain_folder_of_good_images_is_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        draw(tmp_path / "parts" / f"{i:02}.png", rng)
    config = folder(None)
    category = data.load(config, tmp_path / "parts")
    assert (category.name, len(category.train), len(category.calibration)) == ("parts", 14, 10)
    assert len(category.test) == 0 and data.image_hashes(config, tmp_path / "parts")
    (tmp_path / "linked").symlink_to(tmp_path / "parts")  # a link gives its own name
    assert data.load(config, tmp_path / "linked").name == "linked"
    # A test/ beside them is evaluated, and train/good goes before what lies beside it
    for kind in ("good", "scratch"):
        draw(tmp_path / "parts" / "test" / kind / "a.png", rng)
    assert data.load(config, tmp_path / "parts").test_defects == ["good", "scratch"]
    for i in range(20):
        draw(tmp_path / "parts" / "train" / "good" / f"{i:02}.png", rng)
    assert len(data.load(config, tmp_path / "parts").train) == 10


def test_a_mask_belongs_to_the_test_images_and_other_sets_have_no_hashes(tmp_path):
    parts = draw_category(tmp_path / "parts")
    before = data.image_hashes(folder(), tmp_path)
    add_masks(parts)
    after = data.image_hashes(folder(), tmp_path)
    assert after["train_images"] == before["train_images"]
    assert after["test_images"] != before["test_images"]
    assert data.image_hashes(resolve({}), None) == {}


def test_digits_fill_the_range_and_are_split_by_the_seed():
    c, again, other = (
        data.load(resolve({"dataset": "digits", "category": "7", "seed": seed}))
        for seed in (42, 42, 1)
    )
    assert c.test_labels.sum() == (load_digits().target == 7).sum()  # every one is tested
    assert c.train.shape[1:] == (1, 32, 32)
    assert c.train.min() == 0 and c.train.max() == 255
    assert c.test_paths == again.test_paths != other.test_paths


@pytest.mark.parametrize("dataset, category", [("mnist", "3"), ("cifar10", "frog")])
def test_mnist_and_cifar10_are_pooled_and_one_class_is_out(dataset, category, monkeypatch):
    class Stored:
        """A data set of torchvision: an image is its number, whose last digit is its class."""

        def __init__(self, root, train, download):
            numbers = np.arange(160) if train else np.arange(160, 200)
            self.targets = (numbers % 10).tolist()
            shape = (28, 28) if dataset == "mnist" else (32, 32, 3)
            self.data = np.stack([np.full(shape, number, np.uint8) for number in numbers])

    monkeypatch.setattr(f"torchvision.datasets.{dataset.upper()}", Stored)
    data.arrays.cache_clear()
    c = data.load(resolve({"dataset": dataset, "category": category}))
    data.arrays.cache_clear()
    assert c.train.shape[1:] == ((1 if dataset == "mnist" else 3), 32, 32)
    assert (len(c.train), len(c.calibration), len(c.test)) == (115, 29, 56)
    # No image is in two parts
    parts = [set(part.flatten(1)[:, 0].tolist()) for part in (c.train, c.calibration, c.test)]
    assert set.union(*parts) == set(range(200))
    for path, label in zip(c.test_paths, c.test_labels):
        kind, number = path.split("/")
        assert label == (int(number) % 10 == {"3": 3, "frog": 6}[category]) == (kind == category)


@pytest.mark.parametrize("grey", (True, False))
def test_normalisation_removes_exposure_and_leaves_contrast(grey):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(20, 80, (5, 1 if grey else 3, 32, 32), generator=rng).byte()
    expected = to_input(pixels, CPU, 0.8)
    for exposure in (2, 3):
        assert torch.allclose(to_input(exposure * pixels, CPU, 0.8), expected, atol=1e-6)
    relative = pixels[0] / pixels[0].double().mean() - 1
    assert torch.allclose(expected[0].double(), relative / 0.8, atol=1e-6)


def test_normalisation_of_an_image_without_content_is_finite_and_quiet():
    flat = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    flat[1, :, 0, 0] = 254
    flat[2] = 0
    x = to_input(flat, CPU, 0.8)
    assert x.isfinite().all() and x[0].abs().max() < 1e-6 and x[1].abs().max() < 0.1
    assert x[2].min() == x[2].max()
    almost_black = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    almost_black[..., 0, 0] = 2
    assert to_input(almost_black, CPU, 1.0).unique().tolist() == [-1, -0.5]  # of 4 levels
    assert fitted_scale(flat[:2]) == 0.05


def test_the_scale_lets_normal_images_fill_the_range():
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 3, 32, 32, generator=rng)
    pixels = (100 + 10 * noise + 2 * noise**3).clamp(0, 255).byte()  # with a tail
    before = pixels.clone()
    x = to_input(pixels, CPU, fitted_scale(pixels))
    assert torch.equal(pixels, before)
    outside = (x.abs() > 1.05).float().mean()
    assert x.abs().max() > 0.95 and outside < 0.001
    assert fitted_scale(pixels // 2) == pytest.approx(fitted_scale(pixels), rel=0.05)
    # Of large images some pixels, by which the scale is the same
    large = pixels[:, :, :, None, :, None].expand(-1, -1, -1, 4, -1, 4).reshape(50, 3, 128, 128)
    assert fitted_scale(large) == pytest.approx(fitted_scale(pixels), rel=0.02)
