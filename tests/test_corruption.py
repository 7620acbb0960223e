import pytest
import torch

from ganomaly.batches import to_input
from ganomaly.corruption import Corruption, draw_mask

from .conftest import CPU, images


@pytest.mark.parametrize("size", (32, 64, 128))
def test_regions_are_of_all_kinds_and_sizes_and_never_nothing(size):
    rng = torch.Generator().manual_seed(0)
    masks = torch.stack([draw_mask(size, rng) for _ in range(200)])
    assert masks.shape == (200, size, size) and masks.min() == 0 and masks.max() <= 1
    area = (masks > 0.3).float().mean((1, 2))
    assert area.min() * size**2 >= 2 and area.min() < 0.01 and area.max() > 0.08


def test_only_the_region_changes_and_the_mask_is_where():
    pixels = images(40)
    x = to_input(pixels, CPU)
    before = x.clone()
    corrupted, mask = Corruption(pixels, 42, None)(x)
    assert torch.equal(x, before)
    assert corrupted.shape == x.shape and mask.shape == (40, 32, 32)
    assert corrupted.abs().max() <= 1 and set(mask.unique().tolist()) == {0.0, 1.0}
    change = (corrupted - x).abs().mean(1)
    marked = mask.sum((1, 2)) > 0
    assert marked.sum() > 30
    for c, m in zip(change[marked], mask[marked].bool()):
        assert c[m].mean() > 0.04 and c[m].mean() > 3 * c[~m].mean()


def test_a_change_too_small_to_see_is_not_marked():
    pixels = torch.full((8, 3, 32, 32), 100, dtype=torch.uint8)
    corruption = Corruption(pixels, 42, None)
    x, unmarked = to_input(pixels, CPU), 0
    for _ in range(20):
        corrupted, mask = corruption(x)
        change = (corrupted - x).abs().mean(1)
        unmarked += int(((change > 0) & (mask == 0)).sum())
        for c, m in zip(change, mask.bool()):
            assert not m.any() or c[m].mean() > 0.04
    assert unmarked


def test_grey_images_stay_grey_and_coloured_ones_do_not():
    for pixels, grey in ((images(16, channels=1).expand(-1, 3, -1, -1), True), (images(16), False)):
        corrupted, _ = Corruption(pixels, 42, None)(to_input(pixels, CPU))
        spread = (corrupted - corrupted.mean(1, keepdim=True)).abs().max()
        assert (spread < 1e-6) == grey


def test_large_images_have_regions_of_the_same_share():
    masks = [Corruption(images(2, size=size), 42, None).masks for size in (128, 256)]
    assert masks[1].shape == (600, 1, 256, 256)
    shares = [(mask > 0.3).float().mean((1, 2, 3)) for mask in masks]
    assert (shares[0] - shares[1]).abs().max() < 0.01


def test_moved_keeps_the_pixels_of_every_image():
    x = to_input(images(6), CPU)
    moved = Corruption(images(6), 42, None).moved(x, 0.5)
    assert not torch.equal(moved, x)
    assert torch.equal(moved.flatten(2).sort().values, x.flatten(2).sort().values)
