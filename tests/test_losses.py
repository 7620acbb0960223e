"""Each loss against a literal transcription of its formula, in float64."""

import math

import pytest
import torch

from ganomaly import losses


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def test_adversarial_is_the_mean_square_of_feature_differences():
    f, f_hat = rand(3, 5, 4, 4), 2 * rand(3, 5, 4, 4) + 1
    pairs = list(zip(f.flatten().tolist(), f_hat.flatten().tolist()))
    assert losses.adversarial(f, f_hat).item() == pytest.approx(
        sum((a - b) ** 2 for a, b in pairs) / len(pairs), rel=1e-12
    )


def test_contextual_is_the_mean_absolute_difference_of_images():
    x, x_hat = rand(2, 3, 8, 8), 1 - rand(2, 3, 8, 8)
    pairs = list(zip(x.flatten().tolist(), x_hat.flatten().tolist()))
    assert losses.contextual(x, x_hat).item() == pytest.approx(
        sum(abs(a - b) for a, b in pairs) / len(pairs), rel=1e-12
    )


def test_encoder_is_the_mean_square_of_latent_differences():
    z, z_hat = rand(4, 10), 3 * rand(4, 10)
    pairs = list(zip(z.flatten().tolist(), z_hat.flatten().tolist()))
    assert losses.encoder(z, z_hat).item() == pytest.approx(
        sum((a - b) ** 2 for a, b in pairs) / len(pairs), rel=1e-12
    )


def test_discriminator_is_half_the_sum_of_two_cross_entropies():
    real, fake = rand(6), 2 - rand(6)
    bce_real = sum(-math.log(sigmoid(v)) for v in real.tolist()) / 6
    bce_fake = sum(-math.log(1 - sigmoid(v)) for v in fake.tolist()) / 6
    assert losses.discriminator(real, fake).item() == pytest.approx(
        0.5 * (bce_real + bce_fake), rel=1e-12
    )


def test_discriminator_takes_logits_that_a_sigmoid_would_saturate():
    assert losses.discriminator(torch.tensor([-200.0]), torch.tensor([200.0])).item() == 200


@pytest.mark.parametrize("kind", (torch.bfloat16, torch.float16, torch.float32))
def test_losses_are_float32_whatever_comes_in(kind):
    a, b = torch.ones(2, 3, 4, 4, dtype=kind), torch.zeros(2, 3, 4, 4, dtype=kind)
    for loss in (
        losses.adversarial,
        losses.contextual,
        losses.encoder,
        losses.discriminator,
        losses.comparator,
    ):
        assert loss(a, b).dtype == torch.float32
    # 70,000 ones: their float16 sum is infinite
    many = torch.ones(70_000, dtype=kind)
    assert losses.contextual(many, torch.zeros_like(many)).item() == 1


def test_comparator_is_the_focal_loss():
    logits, mask = rand(40), (torch.arange(40) % 3 == 0).double()
    total = 0.0
    for v, m in zip(logits.tolist(), mask.tolist()):
        truth = sigmoid(v) if m else 1 - sigmoid(v)
        total -= (5 if m else 1) * (1 - truth) ** 2 * math.log(truth)
    assert losses.comparator(logits, mask).item() == pytest.approx(total / 40, rel=1e-9)
