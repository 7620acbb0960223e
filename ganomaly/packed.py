"""Convolutions with weights in the CPU's own layout, for scoring.

PyTorch changes the layout at every call. For one image and a deep layer that takes four times as
long as the convolution. The operators are those that torch.compile emits for a CPU.
"""

import copy

import torch
from torch import Tensor, nn


class Packed(nn.Module):
    """An nn.Conv2d or nn.ConvTranspose2d for float32 on a CPU, without gradients."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d):
        super().__init__()
        self.layer = layer
        self.geometry = [layer.padding, layer.stride, layer.dilation, layer.groups]
        if layer.transposed:
            self.geometry.insert(1, layer.output_padding)
        kind = "_transpose" if layer.transposed else ""
        pack = getattr(torch.ops.mkldnn, f"_reorder_convolution{kind}_weight")
        self.weight = pack(layer.weight.detach(), *self.geometry)
        self.convolve = getattr(torch.ops.mkldnn, f"_convolution{kind}_pointwise")

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.layer.bias, *self.geometry, "none", [], "")

    def __reduce__(self):  # packed weights can be neither copied nor pickled
        return Packed, (self.layer,)


def packed(module: nn.Module) -> nn.Module:
    """A copy of a module on a CPU, for inference only. Only the convolutions' weights are new."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.padding_mode == "zeros":
        return Packed(module)
    copied = copy.copy(module)
    copied._modules = {name: packed(child) for name, child in module._modules.items()}
    return copied
