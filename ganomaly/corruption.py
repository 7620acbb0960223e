"""Pseudo-anomalies: normal images with a region replaced, and a mask of the region.

No real defect is imitated. Regions are blobs, rectangles and lines of many sizes. They are filled
with a piece of a normal image, a change of shade, or a flat colour. The idea is that of DRAEM
(Zavrtanik et al., ICCV 2021) and CutPaste (Li et al., CVPR 2021), without DRAEM's textures and
without rules for single categories.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ganomaly.batches import to_input

MASKS = 600  # drawn once a run, then flipped and moved for every image
MASK_SIDE = 128  # pixels; larger masks are enlarged from this side


class Corruption:
    """Corrupts batches made by to_input, with random numbers of `host` and `rng`.

    images: uint8 (n, C, S, S), normal images to paste from, on the device. seed: of the random
    numbers. scale: as for to_input.
    """

    def __init__(self, images: Tensor, seed: int, scale: float | None):
        self.images, self.scale, device = images, scale, images.device
        # Sizes are drawn on the host and pixels on the device, so no step waits for a GPU
        self.host = self.rng = torch.Generator().manual_seed(seed)
        if device.type != "cpu":
            self.rng = torch.Generator(device).manual_seed(seed)
        self.draw = {"generator": self.rng, "device": device}
        size = images.shape[-1]
        side = min(size, MASK_SIDE)
        masks = torch.stack([draw_mask(side, self.host) for _ in range(MASKS)])[:, None]
        self.masks = F.interpolate(masks, (size, size), mode="bilinear").to(device)
        # The spread of colours. It is 0 for grey images, as colour would show what is corrupted
        sample = to_input(images[:256], device, self.scale)
        self.chroma = float((sample - sample.mean(1, keepdim=True)).std())

    def uniform(self, n: int) -> Tensor:
        """(n, 1, 1, 1) in [0, 1): one number for each image."""
        return torch.rand(n, 1, 1, 1, **self.draw)

    def colour(self, like: Tensor) -> Tensor:
        """A random change of colour for each image."""
        return self.chroma * torch.randn(*like.shape[:2], 1, 1, **self.draw)

    def moved(self, images: Tensor, reach: float) -> Tensor:
        """Masks or pieces, each at random transposed, mirrored, rolled by at most reach * S."""
        n, size = len(images), images.shape[-1]
        images = torch.where(self.uniform(n) < 0.5, images, images.transpose(2, 3))
        pixel = torch.arange(size, device=images.device)
        reach = max(1, int(reach * size))
        rows, columns = (
            torch.where(self.uniform(n)[:, 0, 0] < 0.5, pixel, pixel.flip(0))
            .add(torch.randint(-reach, reach + 1, (n, 1), **self.draw))
            .remainder(size)
            for _ in range(2)
        )
        images = images.take_along_dim(rows[:, None, :, None], 2)
        return images.take_along_dim(columns[:, None, None, :], 3)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, S, S) -> (corrupted x, mask (B, S, S) in {0, 1}).

        The mask is empty where the change came out too small to see.
        """
        n, _, size, _ = x.shape
        picked = torch.randint(MASKS, (n,), **self.draw)
        alpha = self.moved(self.masks[picked], 0.25)  # (B, 1, S, S) in [0, 1]

        # A piece of another image, or of itself
        picked = torch.randint(len(self.images), (n,), generator=self.host)
        other = self.images[picked.to(x.device, non_blocking=True)]
        other = to_input(other, x.device, self.scale)
        piece = self.moved(torch.where(self.uniform(n) < 0.5, other, x), 0.5)
        piece = piece * (0.75 + 0.5 * self.uniform(n))
        piece = piece + 0.4 * self.uniform(n) - 0.2 + 0.3 * self.colour(x)
        # Lighter or darker
        sign = self.uniform(n).sub(0.5).sign()
        shade = x * (1 - 0.3 * self.uniform(n)) + 0.5 * self.colour(x)
        shade = shade + sign * (0.12 + self.uniform(n).square())
        # A flat colour with some texture
        cells = int(2 * (size / 2) ** float(torch.rand(1, generator=self.host)))
        texture = torch.randn(n, 1, cells, cells, **self.draw)
        texture = F.interpolate(texture, size=(size, size), mode="bilinear")
        flat = 2 * self.uniform(n) - 1 + 0.3 * self.uniform(n) * texture
        flat = flat + self.colour(x)

        kind = self.uniform(n)
        fill = torch.where(kind < 0.5, piece, torch.where(kind < 0.8, shade, flat))
        weight = alpha * (0.2 + 0.8 * self.uniform(n))
        corrupted = x + weight * (fill.clamp(-1, 1) - x)

        mask = (alpha > 0.3).float()
        change = (corrupted - x).abs().mean(1, keepdim=True)
        mean_change = (change * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)
        return corrupted, mask[:, 0] * (mean_change > 0.04).float()[:, None, None]


def draw_mask(size: int, rng: torch.Generator) -> Tensor:
    """A blob, a rectangle or a line, equally likely: (S, S) in [0, 1], at least two pixels."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    while True:
        kind = int(torch.randint(3, (), generator=rng))
        cy, cx, turn = uniform(0, size), uniform(0, size), uniform(0, math.pi)
        if kind == 0:  # blobs: the highest parts of smooth noise, turned, inside a disc
            cells = [int(2 ** uniform(1.6, 4.3)) for _ in range(2)]
            noise = torch.randn(1, 1, *cells, generator=rng)
            noise = F.interpolate(noise, (2 * size, 2 * size), mode="bicubic", align_corners=True)
            cos, sin = 0.7 * math.cos(turn), 0.7 * math.sin(turn)
            turned = torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]])
            grid = F.affine_grid(turned, [1, 1, size, size], align_corners=False)
            noise = F.grid_sample(noise, grid, align_corners=False)[0, 0]
            inside = torch.hypot(y - cy, x - cx) < size * uniform(0.05, 0.4)
            if inside.sum() < 4:
                continue
            level = torch.quantile(noise[inside], 1 - uniform(0.1, 0.6))
            mask = ((noise >= level) & inside).float()
        elif kind == 1:  # a rectangle, upright or turned
            area, aspect = 2 ** uniform(-9, -3) * size**2, 2 ** uniform(-3, 3)
            height, width = math.sqrt(area * aspect), math.sqrt(area / aspect)
            turn *= uniform(0, 1) < 0.5
            along = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
            across = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
            mask = ((2 * along.abs() <= width) & (2 * across.abs() <= height)).float()
        else:  # a curved line
            length = size * 2 ** uniform(-3, 0)
            bends = torch.randn(1, 1, int(uniform(2, 8)), generator=rng) * uniform(0, 1.5)
            points = max(4, int(length))
            angle = 2 * turn + F.interpolate(bends, points, mode="linear", align_corners=True)[0, 0]
            py = cy + angle.sin().cumsum(0) * length / points
            px = cx + angle.cos().cumsum(0) * length / points
            distance = torch.hypot(y[..., None] - py, x[..., None] - px).amin(2)
            mask = (size / 64 * 2 ** uniform(-1.2, 1.3) + 0.5 - distance).clamp(0, 1)
        if (mask > 0.3).sum() >= 2:
            return mask
