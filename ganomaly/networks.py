"""Encoder, decoder, generator and discriminator of GANomaly (arXiv 1805.06725, section 3.2).

And the comparator, which is not in the paper.
Layouts and initialisation follow the authors' released code: a DCGAN encoder, its mirror as the
decoder, no biases in convolutions. `image_size` is a power of two of at least 32 everywhere.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channel_plan(image_size: int, width: int) -> list[int]:
    """Channels of the maps of side image_size / 2, image_size / 4, ..., 4.

    >>> channel_plan(64, 64)
    [64, 128, 256, 512]
    """
    if image_size < 32 or image_size & (image_size - 1):
        raise ValueError(f"image_size {image_size}: a power of two of at least 32 is needed")
    return [width * 2**level for level in range(int(math.log2(image_size)) - 2)]


def downsampling(image_size: int, channels: int, width: int, extra_layers: int) -> nn.Sequential:
    """Image (B, channels, S, S) -> features (B, channel_plan[-1], 4, 4), after LeakyReLU."""
    plan = channel_plan(image_size, width)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
    ]
    for _ in range(extra_layers):
        layers += [
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    for before, after in zip(plan, plan[1:]):
        layers += [
            nn.Conv2d(before, after, 4, 2, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Image (B, channels, S, S) -> latent (B, latent_dim)."""

    def __init__(
        self, image_size: int, channels: int, width: int, latent_dim: int, extra_layers: int = 0
    ):
        super().__init__()
        self.features = downsampling(image_size, channels, width, extra_layers)
        self.head = nn.Conv2d(channel_plan(image_size, width)[-1], latent_dim, 4, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).flatten(1)


class Decoder(nn.Module):
    """Latent (B, latent_dim) -> image (B, channels, S, S) in [-1, 1]: the encoder's mirror."""

    def __init__(
        self, image_size: int, channels: int, width: int, latent_dim: int, extra_layers: int = 0
    ):
        super().__init__()
        plan = channel_plan(image_size, width)[::-1]
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent_dim, plan[0], 4, 1, 0, bias=False),
            nn.BatchNorm2d(plan[0]),
            nn.ReLU(inplace=True),
        ]
        for before, after in zip(plan, plan[1:]):
            layers += [
                nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        for _ in range(extra_layers):
            layers += [
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])


class Generator(nn.Module):
    """Encoder, decoder, encoder: x -> (z, x_hat, z_hat); the encoders share no weights."""

    def __init__(
        self, image_size: int, channels: int, width: int, latent_dim: int, extra_layers: int = 0
    ):
        super().__init__()
        shape = (image_size, channels, width, latent_dim, extra_layers)
        self.encoder1 = Encoder(*shape)
        self.decoder = Decoder(*shape)
        self.encoder2 = Encoder(*shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder1(x)  # (B, latent_dim)
        x_hat = self.decoder(z)  # (B, C, S, S)
        z_hat = self.encoder2(x_hat)  # (B, latent_dim)
        return z, x_hat, z_hat


class Discriminator(nn.Module):
    """Image (B, channels, S, S) -> (logit (B,), features (B, channel_plan[-1], 4, 4))."""

    def __init__(self, image_size: int, channels: int, width: int, extra_layers: int = 0):
        super().__init__()
        self.features = downsampling(image_size, channels, width, extra_layers)
        self.head = nn.Conv2d(channel_plan(image_size, width)[-1], 1, 4, 1, 0, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.head(features).flatten(), features


class Comparator(nn.Module):
    """x and x_hat, each (B, channels, S, S) -> logits (B, S, S) that x is corrupted there.

    A small U-Net (Ronneberger et al. 2015) from S/2 down to 8x8, which sees both images: DRAEM's
    discriminative network (Zavrtanik et al., ICCV 2021), smaller. Four pixels are four channels of
    its input and output: layers at full size would take half of its time.
    """

    def __init__(self, image_size: int, channels: int, width: int):
        super().__init__()
        plan = [width * min(2**level, 8) for level in range(int(math.log2(image_size)) - 3)]
        inputs = [4 * 2 * channels, *plan]
        self.down = nn.ModuleList(two_convolutions(a, b) for a, b in zip(inputs, plan))
        self.up = nn.ModuleList(two_convolutions(a + b, a) for a, b in zip(plan, plan[1:]))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        both = F.pixel_unshuffle(torch.cat([x, x_hat], 1), 2)
        maps = [self.down[0](both.contiguous(memory_format=torch.channels_last))]
        for block in self.down[1:]:
            maps.append(block(F.max_pool2d(maps[-1], 2)))
        y = maps.pop()
        for block in reversed(self.up):
            y = block(torch.cat([maps.pop(), F.interpolate(y, scale_factor=2)], 1))
        return F.pixel_shuffle(self.head(y), 2)[:, 0]


def two_convolutions(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (before, after):
        layers += [
            nn.Conv2d(inputs, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


def initialise(network: nn.Module, rng: torch.Generator) -> None:
    """Convolutions N(0, 0.02); BatchNorm weight N(1, 0.02), bias 0 (the released code).

    The comparator, which is not theirs, keeps BatchNorm's 1 and 0 and takes He's convolutions.
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


def build(config) -> dict[str, nn.Module]:
    """The networks of a Config by name, not initialised; a comparator where it has a width."""
    size = (config.image_size, config.channels, config.width)
    networks: dict[str, nn.Module] = {
        "generator": Generator(*size, config.latent_dim, config.extra_layers),
        "discriminator": Discriminator(*size, config.extra_layers),
    }
    if config.comparator_width:
        networks["comparator"] = Comparator(*size[:2], config.comparator_width)
    return networks
