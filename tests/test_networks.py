import math

import pytest
import torch
from torch import nn

from ganomaly.config import Config
from ganomaly.networks import Comparator, Discriminator, Generator, build, channel_plan, initialise

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
SIZES = [
    Config(image_size=size, channels=channels, width=4, latent_dim=7)
    for size, channels in ((32, 1), (64, 3), (256, 3))
]
sizes = pytest.mark.parametrize("config", SIZES, ids=lambda c: f"{c.image_size}x{c.channels}")


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def batch(config: Config) -> torch.Tensor:
    return torch.rand(2, config.channels, config.image_size, config.image_size) * 2 - 1


@sizes
def test_shapes_ranges_and_what_the_comparator_sees(config):
    x = batch(config)
    z, x_hat, z_hat = Generator(config)(x)
    assert z.shape == z_hat.shape == (2, 7)
    assert x_hat.shape == x.shape and x_hat.abs().max() <= 1
    logit, features = Discriminator(config)(x)
    assert logit.shape == (2,)
    assert features.shape == (2, 4 * config.image_size // 8, 4, 4)
    # The comparator sees the difference of the images at every pixel, and nothing else of them
    network = Comparator(config.replace(corrupted=0.5, comparator_width=4)).eval()
    initialise(network, torch.Generator().manual_seed(0))
    x_hat = batch(config)
    logits = network(x, x_hat)
    assert logits.shape == (2, config.image_size, config.image_size)
    corner = torch.zeros_like(x)
    corner[..., :4, :4] = 1
    for changed in (network(x + corner, x_hat), network(x, x_hat + corner)):
        assert ((changed - logits)[:, :4, :4].abs().amax((1, 2)) > 0).all()
    assert torch.allclose(network(x + corner, x_hat + corner), logits, atol=1e-4)


@sizes
@pytest.mark.parametrize("extra_layers", (0, 2))
def test_decoder_mirrors_encoder(config, extra_layers):
    def kernels(network):
        return [tuple(m.weight.shape) for m in network.modules() if isinstance(m, CONVOLUTIONS)]

    network = Generator(config.replace(extra_layers=extra_layers))
    # A transposed convolution's weight is (in, out, k, k), so its mirror has the same shape.
    assert kernels(network.encoder1) == kernels(network.decoder)[::-1]


def test_known_sizes_of_the_paper_networks():
    # 64 px, 3 channels, width 64, latent 100: 4x4 kernels 3-64-128-256-512-100 and BatchNorm
    pyramid = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512)
    encoder = pyramid + 16 * 512 * 100
    generator = Generator(Config())
    assert parameters(generator.encoder1) == encoder == 3_576_576
    assert parameters(Discriminator(Config())) == pyramid + 16 * 512
    # The decoder has BatchNorm at its 64 channels too
    assert parameters(generator) == 3 * encoder + 2 * 64
    # Channels double up to 256 pixels and no further
    assert channel_plan(32, 3) == [3, 6, 12]
    assert channel_plan(256, 3) == [3, 6, 12, 24, 48, 96]
    assert channel_plan(1024, 3) == [3, 6, 12, 24, 48, 96, 96, 96]


def test_initialisation_is_applied_and_the_paper_s_convolutions_have_no_bias():
    config = Config(width=32, latent_dim=50, extra_layers=1, corrupted=0.5, comparator_width=16)
    networks = build(config)
    for name, network in networks.items():
        initialise(network, torch.Generator().manual_seed(0))
        for module in network.modules():
            he = name == "comparator"
            if isinstance(module, CONVOLUTIONS):
                n = module.weight.numel()
                std = math.sqrt(2 / module.weight[0].numel()) if he else 0.02
                assert abs(module.weight.std() - std) < 5 * std / math.sqrt(2 * n)
                assert abs(module.weight.mean()) < 5 * std / math.sqrt(n)
                assert module.bias is None or he and module.bias.abs().max() == 0
            if isinstance(module, nn.BatchNorm2d):
                assert module.bias.abs().max() == 0 and abs(module.weight.mean() - 1) < 0.02
                assert (module.weight == 1).all() if he else 0 < module.weight.std() < 0.04
    generator = networks["generator"]
    assert not torch.equal(generator.encoder1.head.weight, generator.encoder2.head.weight)


def test_only_the_image_layers_and_heads_lack_batchnorm():
    network = Generator(Config(width=8))
    layers = list(network.encoder1.features)
    assert isinstance(layers[1], nn.LeakyReLU) and layers[1].negative_slope == 0.2
    assert [type(m) for m in layers[2:5]] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    layers = list(network.decoder.layers)
    assert [type(m) for m in layers[:3]] == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(m) for m in layers[-2:]] == [nn.ConvTranspose2d, nn.Tanh]
