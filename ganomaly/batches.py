"""Images on the device: where they are kept, how a network sees them, in which order."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """On the device where they take at most half of its free memory, else left on the host."""
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return images
    return images.to(device)


def to_input(pixels: Tensor, device: torch.device, normalise: str = "none") -> Tensor:
    """uint8 (B, C, S, S) -> float32 in [-1, 1] on the device, channels last.

    With normalise "image" an image's mean becomes 0 and its standard deviation 1/4, so that neither
    its exposure nor its contrast is seen; what is more than four deviations away is clipped.
    """
    x = pixels.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    if normalise == "none":
        return x.div_(127.5).sub_(1.0)
    x -= x.mean((1, 2, 3), keepdim=True)
    deviation = x.square().mean((1, 2, 3), keepdim=True).sqrt()
    # A deviation under 4 levels is noise, of an image without content
    return x.div_(4 * deviation.clamp_min(4)).clamp_(-1, 1)


class Batches:
    """Endless stream of shuffled passes over the images, cut into equal pieces.

    No image is left out of a pass, and a set smaller than a batch fills it from several passes.
    """

    def __init__(self, images: Tensor, batch_size: int, rng: torch.Generator):
        self.images, self.batch_size, self.rng = images, batch_size, rng
        self.order = torch.empty(0, dtype=torch.long, device=images.device)

    def next(self) -> Tensor:
        """uint8 (batch_size, C, S, S), drawn by index where the images are."""
        while len(self.order) < self.batch_size:
            again = torch.randperm(len(self.images), generator=self.rng)
            self.order = torch.cat([self.order, again.to(self.images.device)])
        picked, self.order = self.order.split([self.batch_size, len(self.order) - self.batch_size])
        return self.images[picked]

    def state_dict(self) -> dict:
        return {"rng": self.rng.get_state(), "order": self.order.cpu().clone()}

    def load_state_dict(self, state: dict) -> None:
        self.rng.set_state(state["rng"].cpu())
        self.order = state["order"].to(self.images.device)
