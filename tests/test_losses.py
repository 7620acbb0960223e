"""Each loss against a literal transcription of its formula."""

import math

import pytest
import torch

from ganomaly import losses


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def test_discriminator_is_half_the_sum_of_two_cross_entropies():
    real, fake = rand(6), 2 - rand(6)
    bce_real = sum(-math.log(sigmoid(v)) for v in real.tolist()) / 6
    bce_fake = sum(-math.log(1 - sigmoid(v)) for v in fake.tolist()) / 6
    loss = losses.discriminator(real, fake).item()
    assert loss == pytest.approx(0.5 * (bce_real + bce_fake), rel=1e-6)
    # Logits that a sigmoid would saturate
    assert losses.discriminator(torch.tensor([-200.0]), torch.tensor([200.0])).item() == 200


def test_comparator_is_the_focal_loss():
    logits, mask = rand(40), (torch.arange(40) % 3 == 0).double()
    total = 0.0
    for v, m in zip(logits.tolist(), mask.tolist()):
        truth = sigmoid(v) if m else 1 - sigmoid(v)
        total -= (5 if m else 1) * (1 - truth) ** 2 * math.log(truth)
    assert losses.comparator(logits, mask).item() == pytest.approx(total / 40, rel=1e-5)


def test_losses_are_float32_whatever_comes_in():
    a, b = (kind(2, 3, 4, 4, dtype=torch.float16) for kind in (torch.ones, torch.zeros))
    for name in ("adversarial", "contextual", "encoder", "discriminator", "comparator"):
        assert getattr(losses, name)(a, b).dtype == torch.float32
    # The float16 sum of 70,000 ones is infinite
    many = torch.ones(70_000, dtype=torch.float16)
    assert losses.contextual(many, torch.zeros_like(many)).item() == 1
