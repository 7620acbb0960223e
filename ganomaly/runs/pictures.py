"""What the detector sees in an image, for people: image, reconstruction, heat map over it."""

import io

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

SIDE = 256  # of each of the three pictures, pixels
FULL = 5.0  # heat from here on has the full colour; heat of 0 or less, normal, is not drawn
WORST = 60  # images on a page of verdicts
LEAST = 2.0  # heat of the hottest pixel of an image that is called defective, at least


def explained(
    image: Tensor, x_hat: Tensor, heat: Tensor, defective: bool, caption: str = ""
) -> Image.Image:
    """Three squares side by side: the image, its reconstruction, the heat map over the grey image.

    image, x_hat: uint8 (C, S, S) of any sizes; heat: float32 (S, S), see Detector.heat_maps. The
    scale of the heat is fixed. Only where a defective image has no heat, its hottest pixels get
    some: the verdict is by the score, which may see what the map does not.
    """
    if defective:
        heat = heat + max(0.0, LEAST - float(heat.max()))
    squares = [
        F.interpolate(pixels[None].float(), (SIDE, SIDE), mode="area")[0].expand(3, -1, -1)
        for pixels in (image, x_hat)
    ]
    strength = F.interpolate(heat[None, None], (SIDE, SIDE), mode="bilinear")[0]
    strength = (strength / FULL).clamp(0, 1)  # (1, SIDE, SIDE)
    # From yellow to red
    colour = torch.cat([torch.full_like(strength, 255), 230 * (1 - strength), 0 * strength])
    cover = 0.85 * strength.sqrt()
    squares.append(squares[0].mean(0, keepdim=True) * (1 - cover) + colour * cover)
    pixels = torch.cat([s.round() for s in squares], 2).to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    draw, place = ImageDraw.Draw(picture), (2 * SIDE + 6, SIDE - 16)
    draw.text(place, caption, "white", stroke_width=2, stroke_fill="black")
    return picture


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    """PNG at compression 1 (a third of the default's time, an eighth more bytes), or JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, compress_level=1, quality=90)
    return buffer.getvalue()


def panel(x: Tensor, x_hat: Tensor) -> Tensor:
    """(3, H, W) in [0, 1]: a row of images, of reconstructions, of mean absolute differences.

    x, x_hat: (B, C, S, S) in [-1, 1]; a grey pixel between them and around.
    """
    from torchvision.utils import make_grid  # late, as it is slow to import

    difference = ((x - x_hat).abs().mean(1, keepdim=True) / 0.5).expand_as(x)
    images = torch.cat([(x + 1) / 2, (x_hat + 1) / 2, difference]).float().cpu().clamp(0, 1)
    return make_grid(images, nrow=len(x), padding=1, pad_value=0.5)
