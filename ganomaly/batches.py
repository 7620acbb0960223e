"""What a network sees: batches of images on the device, with or without their exposure."""

from collections.abc import Iterator

import torch
from torch import Tensor

DARK = 4  # grey levels; a smaller mean is raised to this, as such an image holds only noise


def to_input(pixels: Tensor, device: torch.device, scale: float | None = None) -> Tensor:
    """uint8 (B, C, S, S) -> float32 on the device, channels last; without a scale in [-1, 1].

    With a scale the result is relative(pixels) / scale. Values beyond 1 are not clipped, but the
    generator cannot reconstruct them.
    """
    x = pixels.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    if scale is None:
        return x.div_(127.5).sub_(1.0)
    return relative(x).div_(scale)


def from_input(x: Tensor, pixels: Tensor, scale: float | None = None) -> Tensor:
    """The inverse of to_input for x (B, C, S, S), in the exposure of uint8 pixels (B, C, S, S)."""
    if scale is None:
        grey = (x + 1) * 127.5
    else:
        grey = (x * scale + 1) * pixels.float().mean((1, 2, 3), keepdim=True).clamp_min(DARK)
    return grey.round().clamp(0, 255).to(torch.uint8)


def relative(x: Tensor) -> Tensor:
    """Divide grey levels (B, C, S, S) by the mean of their image and subtract 1, in place."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return x.div_(mean.clamp_min(DARK)).sub_(1)


def fitted_scale(images: Tensor) -> float:
    """The scale that puts 99.9 % of the pixels of uint8 images (N, C, S, S) within [-1, 1].

    About 200 images and 64 x 64 pixels of each are used, evenly spread. Without a fitted scale,
    images of low contrast would fill only a small part of the range.
    """
    picked, stride = images[:: max(1, len(images) // 200)], max(1, images.shape[-1] // 64)
    parts = [relative(part.float())[..., ::stride, ::stride] for part in picked.split(16)]
    distances = torch.cat(parts).abs_().flatten()
    return max(float(distances.kthvalue(max(1, int(0.999 * len(distances)))).values), 0.05)


def batches(n: int, batch_size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Yield indices (batch_size,) of n images without end, in shuffled passes of each image once.

    A batch may span passes.
    """
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(n, generator=rng)])
        yield order[:batch_size]
        order = order[batch_size:]
