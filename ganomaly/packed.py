"""Convolutions whose weights are laid out once as a CPU computes with them, for scoring.

PyTorch does that at every call, and with a deep layer's weights it takes four times as long as one
image does to pass through them. The operators are those that torch.compile emits for a CPU.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

OPERATORS = torch.ops.mkldnn  # of oneDNN, formerly MKL-DNN


class Packed(nn.Module):
    """What an nn.Conv2d or nn.ConvTranspose2d computes of float32, on a CPU, without gradients."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d):
        super().__init__()
        self.layer = layer
        self.shape = [layer.padding, layer.stride, layer.dilation, layer.groups]
        transposed = isinstance(layer, nn.ConvTranspose2d)
        if transposed:
            self.shape.insert(1, layer.output_padding)
        kind = "_transpose" if transposed else ""
        pack = getattr(OPERATORS, f"_reorder_convolution{kind}_weight")
        self.weight = pack(layer.weight.detach(), *self.shape)
        self.convolve = getattr(OPERATORS, f"_convolution{kind}_pointwise")

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.layer.bias, *self.shape, "none", [], "")

    def __reduce__(self):  # what is packed can be neither copied nor pickled
        return Packed, (self.layer,)


def packed(module: nn.Module) -> nn.Module:
    """A twin of a module, on a CPU, for inference only; all but convolutions' weights is shared."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return Packed(module)
    twin = copy.copy(module)
    twin._modules = {name: packed(child) for name, child in module._modules.items()}
    return twin


def can_pack(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(OPERATORS, "_convolution_transpose_pointwise")
    )
