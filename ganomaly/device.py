"""Which device computes, with how many threads. It imports little, as predict waits for it."""

import os
import warnings

import torch
from threadpoolctl import threadpool_limits

from ganomaly.errors import UserError


def use_device(name: str, deterministic: bool = False) -> torch.device:
    """The device of a name; auto is CUDA where there is one, else the CPU.

    The processes of a launcher on one host (torchrun's LOCAL_RANK) take its GPUs in turn.
    `deterministic` allows CUDA only algorithms that sum in a fixed order. UserError where there is
    no such device.
    """
    n = torch.cuda.device_count()
    if name == "cuda" and n or name == "auto":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % n}" if n else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason}; allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A warning about `capturable` does not hold: fused Adam counts its steps on the GPU anyway
        warnings.filterwarnings("ignore", ".*capturable")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for cuBLAS
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # we read none
        torch.backends.cudnn.deterministic = True
        # Scores are true float32; by default cuDNN uses TF32, which has the mantissa of fp16
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    return device


def use_threads(n: int) -> None:
    """Set PyTorch's and BLAS's threads. Sums, and so results, depend on their number."""
    torch.set_num_threads(n)
    threadpool_limits(n, user_api="blas")
