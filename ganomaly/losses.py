"""The paper's losses (arXiv 1805.06725, section 3.3) and the comparator's, each with its formula.

All take any floating type and return a float32 scalar, because half precision is too coarse for
sums over thousands of pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def adversarial(f: Tensor, f_hat: Tensor) -> Tensor:
    """L_adv = mean (f(x) - f(x_hat))^2   (eq. 1; the mean square of the released code)

    f, f_hat: the discriminator's features (B, K, 4, 4) of x and x_hat.
    """
    return F.mse_loss(f_hat.float(), f.float())


def contextual(x: Tensor, x_hat: Tensor) -> Tensor:
    """L_con = mean |x - x_hat|   (eq. 2)

    x, x_hat: images (B, C, S, S), x_hat in [-1, 1].
    """
    return F.l1_loss(x_hat.float(), x.float())


def encoder(z: Tensor, z_hat: Tensor) -> Tensor:
    """L_enc = mean (z - z_hat)^2   (eq. 3; the mean square of the released code)

    z, z_hat: latents (B, latent_dim).
    """
    return F.mse_loss(z_hat.float(), z.float())


def discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """L_D = 0.5 (BCE(D(x), 1) + BCE(D(x_hat), 0))   (the released code)

    real, fake: logits (B,) of x and of x_hat.
    """
    real, fake = real.float(), fake.float()
    return 0.5 * (
        F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    )


def comparator(logits: Tensor, mask: Tensor) -> Tensor:
    """L_cmp = mean w (1 - p)^2 BCE   (focal loss, Lin et al., ICCV 2017)

    logits: (B, S, S), of "this pixel is corrupted"; mask: (B, S, S), 1 where it is, else 0.
    p is the probability of the true answer. Corrupted pixels are few and have w = 5, others 1.
    """
    mask = mask.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none")
    missed = (1 - torch.exp(-cross_entropy)).square()
    return ((1 + 4 * mask) * missed * cross_entropy).mean()
