"""Images on the device: where they are kept, how a network sees them, in which order."""

from __future__ import annotations

import torch
from torch import Tensor

DARK = 4  # grey levels: an image of a smaller mean is noise, which is not raised


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """On the device where they take at most half of its free memory, else left on the host."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if images.nbytes > (torch.cuda.mem_get_info(device)[0] + kept) // 2:
            return images
    return images.to(device)


def to_input(pixels: Tensor, device: torch.device, scale: float | None = None) -> Tensor:
    """uint8 (B, C, S, S) -> float32 on the device, channels last; without a scale in [-1, 1].

    With a scale an image is seen relative to its mean (see `relative`), and a pixel that is `scale`
    away from it at 1 or -1. What is farther is not clipped, but no reconstruction reaches it.
    """
    x = pixels.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    if scale is None:
        return x.div_(127.5).sub_(1.0)
    return relative(x).div_(scale)


def from_input(x: Tensor, pixels: Tensor, scale: float | None = None) -> Tensor:
    """What to_input did to uint8 pixels (B, C, S, S), undone for another x (B, C, S, S)."""
    if scale is None:
        grey = (x + 1) * 127.5
    else:
        grey = (x * scale + 1) * pixels.float().mean((1, 2, 3), keepdim=True).clamp_min(DARK)
    return grey.round().clamp(0, 255).to(torch.uint8)


def relative(x: Tensor) -> Tensor:
    """Grey levels (B, C, S, S), in place: each over the mean of its image, less 1.

    Exposure multiplies all pixels of an image; this takes it out and leaves the contrast.
    """
    mean = x.mean((1, 2, 3), keepdim=True)
    return x.div_(mean.clamp_min(DARK)).sub_(1)


def fitted_scale(images: Tensor) -> float:
    """The scale at which uint8 images (N, C, S, S) fill the range but for a pixel in a thousand.

    From about 200 of them and 64 x 64 pixels of each, evenly spread. A fixed one would give a set
    of low contrast a small part of the range, and small residuals.
    """
    picked, apart = images[:: max(1, len(images) // 200)], max(1, images.shape[-1] // 64)
    parts = [relative(part.float())[..., ::apart, ::apart] for part in picked.split(16)]
    far = torch.cat(parts).abs_().flatten()
    return max(float(far.kthvalue(max(1, int(0.999 * len(far)))).values), 0.05)


class Batches:
    """Endless stream of shuffled passes over the images, cut into equal pieces.

    No image is left out of a pass, and a set smaller than a batch fills it from several passes.
    """

    def __init__(self, images: Tensor, batch_size: int, rng: torch.Generator):
        self.images, self.batch_size, self.rng = images, batch_size, rng
        self.order = torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor:
        """uint8 (batch_size, C, S, S), drawn by index where the images are."""
        while len(self.order) < self.batch_size:
            again = torch.randperm(len(self.images), generator=self.rng)
            self.order = torch.cat([self.order, again])
        picked, self.order = self.order.split([self.batch_size, len(self.order) - self.batch_size])
        return self.images[picked.to(self.images.device, non_blocking=True)]

    def state_dict(self) -> dict:
        return {"rng": self.rng.get_state(), "order": self.order.clone()}

    def load_state_dict(self, state: dict) -> None:
        self.rng.set_state(state["rng"].cpu())
        self.order = state["order"].clone()
