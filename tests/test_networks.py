import itertools
import math

import pytest
import torch
from torch import nn

from ganomaly.config import Config
from ganomaly.networks import (
    Comparator,
    Decoder,
    Discriminator,
    Encoder,
    Generator,
    build,
    channel_plan,
    initialise,
)

SIZES = list(itertools.product((32, 64, 128, 256), (1, 3)))
LATENT, WIDTH = 7, 4


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def pyramid(image_size: int, channels: int, width: int) -> int:
    """Weights of the encoder up to its 4x4 map: 4x4 kernels and BatchNorm pairs, by hand."""
    levels = int(math.log2(image_size)) - 3
    convolutions = 16 * channels * width + sum(16 * 2 * (width * 2**i) ** 2 for i in range(levels))
    return convolutions + sum(2 * width * 2 ** (i + 1) for i in range(levels))


@pytest.mark.parametrize("image_size, channels", SIZES)
def test_shapes_and_ranges(image_size, channels):
    x = torch.rand(2, channels, image_size, image_size) * 2 - 1
    z, x_hat, z_hat = Generator(image_size, channels, WIDTH, LATENT)(x)
    assert z.shape == z_hat.shape == (2, LATENT)
    assert x_hat.shape == x.shape and x_hat.abs().max() <= 1
    logit, features = Discriminator(image_size, channels, WIDTH)(x)
    assert logit.shape == (2,)
    assert features.shape == (2, WIDTH * image_size // 8, 4, 4)


@pytest.mark.parametrize("image_size, channels", SIZES)
def test_parameter_counts(image_size, channels):
    last = WIDTH * image_size // 8
    base = pyramid(image_size, channels, WIDTH)
    encoder, decoder = (kind(image_size, channels, WIDTH, LATENT) for kind in (Encoder, Decoder))
    assert parameters(encoder) == base + 16 * last * LATENT
    assert parameters(Discriminator(image_size, channels, WIDTH)) == base + 16 * last
    # The mirror has BatchNorm after its first layer too, and as the encoder none at the image.
    batchnorms = sum(2 * c for c in channel_plan(image_size, WIDTH))
    convolutions = parameters(encoder) - (batchnorms - 2 * WIDTH)
    assert parameters(decoder) == convolutions + batchnorms
    generator = Generator(image_size, channels, WIDTH, LATENT)
    assert parameters(generator) == 2 * parameters(encoder) + parameters(decoder)


@pytest.mark.parametrize("image_size, channels", SIZES)
@pytest.mark.parametrize("extra_layers", (0, 2))
def test_decoder_mirrors_encoder(image_size, channels, extra_layers):
    def kernels(network, kind):
        weights = [m.weight for m in network.modules() if isinstance(m, kind)]
        return [tuple(w.shape) for w in weights]

    shape = (image_size, channels, WIDTH, LATENT, extra_layers)
    both = (nn.Conv2d, nn.ConvTranspose2d)
    down, up = kernels(Encoder(*shape), both), kernels(Decoder(*shape), both)
    # A transposed convolution's weight is (in, out, k, k), so its mirror has the same shape.
    assert down == up[::-1]


def test_known_size_of_the_paper_network():
    # 64 px, 3 channels, width 64, latent 100: 4x4 kernels 3-64-128-256-512-100 and BatchNorm
    encoder = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 100) + 2 * (128 + 256 + 512)
    assert parameters(Encoder(64, 3, 64, 100)) == encoder == 3_576_576


@pytest.mark.parametrize("extra_layers", (0, 1))
def test_initialisation_is_applied_and_no_convolution_has_a_bias(extra_layers):
    generator = Generator(64, 3, 32, 50, extra_layers)
    for network in (generator, Discriminator(64, 3, 32, extra_layers)):
        initialise(network, torch.Generator().manual_seed(0))
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                n = module.weight.numel()
                assert module.bias is None
                assert abs(module.weight.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * n)
                assert abs(module.weight.mean()) < 5 * 0.02 / math.sqrt(n)
            if isinstance(module, nn.BatchNorm2d):
                assert module.bias.abs().max() == 0
                assert 0 < module.weight.std() < 0.04 and abs(module.weight.mean() - 1) < 0.02
    first, second = generator.encoder1.head.weight, generator.encoder2.head.weight
    assert not torch.equal(first, second)


def test_only_the_image_layers_and_heads_lack_batchnorm():
    layers = list(Encoder(64, 3, 8, 10).features)
    assert isinstance(layers[1], nn.LeakyReLU) and layers[1].negative_slope == 0.2
    assert [type(m) for m in layers[2:5]] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    layers = list(Decoder(64, 3, 8, 10).layers)
    assert [type(m) for m in layers[:3]] == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(m) for m in layers[-2:]] == [nn.ConvTranspose2d, nn.Tanh]


@pytest.mark.parametrize("image_size", (0, 16, 48, 100))
def test_other_sizes_are_refused(image_size):
    with pytest.raises(ValueError, match="power of two"):
        Encoder(image_size, 3, 4, 8)


@pytest.mark.parametrize("image_size, channels", SIZES)
def test_the_comparator_sees_both_images_at_every_pixel(image_size, channels):
    network = Comparator(image_size, channels, WIDTH).eval()
    initialise(network, torch.Generator().manual_seed(0))
    x, x_hat = torch.rand(2, 2, channels, image_size, image_size)
    logits = network(x, x_hat)
    assert logits.shape == (2, image_size, image_size)
    corner = torch.zeros_like(x)
    corner[..., :4, :4] = 1
    for changed in (network(x + corner, x_hat), network(x, x_hat + corner)):
        assert ((changed - logits)[:, :4, :4].abs().amax((1, 2)) > 0).all()


def test_the_comparator_starts_with_he_s_convolutions():
    network = Comparator(64, 3, 16)
    initialise(network, torch.Generator().manual_seed(0))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            error = 5 / math.sqrt(2 * module.weight.numel())
            assert abs(module.weight.std() * math.sqrt(fan_in / 2) - 1) < error
            assert module.bias is None or module.bias.abs().max() == 0
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_a_config_has_a_comparator_where_it_has_a_width():
    assert list(build(Config(width=4))) == ["generator", "discriminator"]
    with_one = build(Config(width=4, corrupted=0.5, comparator_width=4))
    assert list(with_one) == ["generator", "discriminator", "comparator"]
