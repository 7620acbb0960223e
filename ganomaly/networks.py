"""Encoder, decoder, generator and discriminator of GANomaly (arXiv 1805.06725, section 3.2).

Layouts and initialisation follow the authors' released code: a DCGAN encoder, its mirror as the
decoder, no biases in convolutions. `image_size` is a power of two of at least 32 everywhere.
"""

from __future__ import annotations

import math

import torch
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


def initialise(network: nn.Module, rng: torch.Generator) -> None:
    """Convolutions N(0, 0.02); BatchNorm weight N(1, 0.02), bias 0 (the released code)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02, generator=rng)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02, generator=rng)
            nn.init.zeros_(module.bias)


def build(config) -> tuple[Generator, Discriminator]:
    """The two networks of a Config, not initialised."""
    size = (config.image_size, config.channels, config.width)
    generator = Generator(*size, config.latent_dim, config.extra_layers)
    return generator, Discriminator(*size, config.extra_layers)
