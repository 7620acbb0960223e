"""Encoder, decoder, generator and discriminator (arXiv 1805.06725, section 3.2); the comparator.

Layouts and initialisation follow the authors' released code: a DCGAN encoder, its mirror as the
decoder, no biases in convolutions. The comparator is not in the paper. Every network takes a
Config; S is its image_size.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ganomaly.config import Config

relu = partial(nn.ReLU, inplace=True)
leaky_relu = partial(nn.LeakyReLU, 0.2, inplace=True)


def channel_plan(image_size: int, width: int) -> list[int]:
    """Channels of the maps of side image_size / 2, image_size / 4, ..., 4."""
    # The authors double the channels at every level. Beyond 256 px that makes 735 million
    # parameters (512 px) and 2.9 billion (1024 px), so the channels of 256 px are the most.
    return [width * min(2**level, 32) for level in range(int(math.log2(image_size)) - 2)]


def block(convolution: nn.Module, activation: nn.Module) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), activation]


def downsampling(config: Config) -> nn.Sequential:
    """Image (B, channels, S, S) -> features (B, channel_plan[-1], 4, 4), after LeakyReLU."""
    plan, width = channel_plan(config.image_size, config.width), config.width
    layers = [nn.Conv2d(config.channels, width, 4, 2, 1, bias=False), leaky_relu()]
    for _ in range(config.extra_layers):
        layers += block(nn.Conv2d(width, width, 3, 1, 1, bias=False), leaky_relu())
    for before, after in zip(plan, plan[1:]):
        layers += block(nn.Conv2d(before, after, 4, 2, 1, bias=False), leaky_relu())
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Image (B, channels, S, S) -> latent (B, latent_dim)."""

    def __init__(self, config: Config):
        super().__init__()
        self.features = downsampling(config)
        last = channel_plan(config.image_size, config.width)[-1]
        self.head = nn.Conv2d(last, config.latent_dim, 4, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).flatten(1)


class Decoder(nn.Module):
    """Latent (B, latent_dim) -> image (B, channels, S, S) in [-1, 1]: the encoder's mirror."""

    def __init__(self, config: Config):
        super().__init__()
        plan, width = channel_plan(config.image_size, config.width)[::-1], config.width
        layers = block(nn.ConvTranspose2d(config.latent_dim, plan[0], 4, 1, 0, bias=False), relu())
        for before, after in zip(plan, plan[1:]):
            layers += block(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), relu())
        for _ in range(config.extra_layers):
            layers += block(nn.Conv2d(width, width, 3, 1, 1, bias=False), relu())
        layers += [nn.ConvTranspose2d(width, config.channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])


class Generator(nn.Module):
    """Encoder, decoder, encoder: x -> (z, x_hat, z_hat); the encoders share no weights."""

    def __init__(self, config: Config):
        super().__init__()
        self.encoder1 = Encoder(config)
        self.decoder = Decoder(config)
        self.encoder2 = Encoder(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder1(x)  # (B, latent_dim)
        x_hat = self.decoder(z)  # (B, C, S, S)
        z_hat = self.encoder2(x_hat)  # (B, latent_dim)
        return z, x_hat, z_hat


class Discriminator(Encoder):
    """An encoder to one number: x -> (logit (B,), features (B, channel_plan[-1], 4, 4))."""

    def __init__(self, config: Config):
        super().__init__(config.replace(latent_dim=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.head(features).flatten(), features


class Comparator(nn.Module):
    """Images x and x_hat (B, channels, S, S) -> logits (B, S, S): is this pixel corrupted?

    A small U-Net (Ronneberger et al. 2015) with maps from S/2 down to 8x8. It is a smaller version
    of DRAEM's discriminative network (Zavrtanik et al., ICCV 2021). It sees only x - x_hat.
    From the images it would learn the training set by heart. Each 2x2 square of its input and
    output becomes four channels. Layers at full size would take half of its time.
    """

    def __init__(self, config: Config):
        super().__init__()
        width, levels = config.comparator_width, int(math.log2(config.image_size)) - 3
        plan = [width * min(2**level, 8) for level in range(levels)]
        inputs = [4 * config.channels, *plan]
        self.down = nn.ModuleList(two_convolutions(a, b) for a, b in zip(inputs, plan))
        self.up = nn.ModuleList(two_convolutions(a + b, a) for a, b in zip(plan, plan[1:]))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        squares = F.pixel_unshuffle(x - x_hat, 2)
        maps = [self.down[0](squares.contiguous(memory_format=torch.channels_last))]
        for level in self.down[1:]:
            maps.append(level(F.max_pool2d(maps[-1], 2)))
        y = maps.pop()
        for level in reversed(self.up):
            y = level(torch.cat([maps.pop(), F.interpolate(y, scale_factor=2)], 1))
        return F.pixel_shuffle(self.head(y), 2)[:, 0]


def two_convolutions(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (before, after):
        layers += block(nn.Conv2d(inputs, after, 3, 1, 1, bias=False), relu())
    return nn.Sequential(*layers)


def initialise(network: nn.Module, rng: torch.Generator) -> None:
    """Convolutions N(0, 0.02); BatchNorm weight N(1, 0.02), bias 0 (the released code).

    The comparator is not theirs: it has He's convolutions, and BatchNorm's default 1 and 0.
    """
    for module in network.modules():
        if isinstance(network, Comparator):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=rng)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02, generator=rng)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02, generator=rng)
            nn.init.zeros_(module.bias)
        elif list(module.parameters(recurse=False)):
            raise TypeError(f"initialise() must draw the weights of {type(module).__name__}")


def build(config: Config) -> dict[str, nn.Module]:
    """The networks by name, not initialised; a comparator where it has a width."""
    networks = {"generator": Generator(config), "discriminator": Discriminator(config)}
    if config.comparator_width:
        networks["comparator"] = Comparator(config)
    return networks
