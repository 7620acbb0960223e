from types import SimpleNamespace

import pytest
import torch

from ganomaly.runs import evaluation


def test_counted_pixels_have_the_auroc_of_all_pixels(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    masks = torch.rand(20, 32, 32, generator=rng) < 0.02
    heat = torch.randn(20, 32, 32, generator=rng) + masks.float()
    test = torch.arange(20)[:, None]  # an image is its number
    category = SimpleNamespace(name="parts", test=test, test_masks=masks)
    passes = []

    def heat_maps(images):
        passes.append(len(images))
        return heat[images[:, 0]]

    detector = SimpleNamespace(batch=8, heat_maps=heat_maps)
    exact = evaluation.pixel_auroc(detector, category)
    monkeypatch.setattr(evaluation, "EXACT_PIXELS", masks.numel() - 1)
    assert evaluation.pixel_auroc(detector, category) == pytest.approx(exact, abs=1e-5)
    assert passes == [20, 8, 8, 4] and exact > 0.7
