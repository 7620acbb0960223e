"""Training speed with changes that are not in the code, for experiments/speed/gpu.sh.

python experiments/speed/variants.py DEVICE SECONDS IMAGE_SIZE,BATCH_SIZE,WIDTH...

A change goes into the code if it pays on a GPU. It is tried here first, so the code stays as it is.
"""

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

from ganomaly import training
from ganomaly.networks import Decoder, Encoder
from scripts.speed import time_steps


class Product(nn.Module):
    """A convolution of 4x4 pixels to one, or its transpose, as a matrix product."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d):
        super().__init__()
        self.transposed = isinstance(layer, nn.ConvTranspose2d)
        self.weight = nn.Parameter(layer.weight.detach().permute(0, 2, 3, 1).flatten(1))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, 4, 4) -> (B, K, 1, 1); transposed: back
        if self.transposed:
            return (x.flatten(1) @ self.weight).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), self.weight)[:, :, None, None]


def with_products(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, Encoder):
            module.head = Product(module.head)
        elif isinstance(module, Decoder):
            module.layers[0] = Product(module.layers[0])


def compiled(network: nn.Module) -> None:
    torch._functorch.config.donated_buffer = False  # a step takes two gradients of one pass
    network.compile()


def in_bf16(network: nn.Module) -> None:
    """Convolutions keep their weights in bf16 only, so autocast has none to cast.

    This is an upper bound of the gain: training would need float32 weights beside them.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data = module.weight.data.to(torch.bfloat16)


VARIANTS = {
    "as it is": (),
    "heads as products": (with_products,),
    "weights in bf16": (in_bf16,),
    "networks compiled": (compiled,),
    "heads as products, networks compiled": (with_products, compiled),
}
initialise = training.initialise


def main(device: str, seconds: str, *shapes: str) -> None:
    for shape in shapes:
        keys = ("image_size", "batch_size", "width")
        values = dict(zip(keys, map(int, shape.split(","))))
        for name, changes in VARIANTS.items():

            def changed(network, rng, changes=changes):
                initialise(network, rng)
                for change in changes:
                    change(network)

            training.initialise = changed
            torch.compiler.reset()
            print(f"{shape} {name}: ", end="", flush=True)
            try:
                time_steps(device, float(seconds), values)
            except Exception:  # the others are measured all the same
                print(traceback.format_exc().splitlines()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
