"""A training step recorded as a CUDA graph and replayed: one launch in place of hundreds.

At 64 pixels a step's kernels take a GPU less time than Python takes to ask for them: 2.3 ms for 7.8
on an H100 (experiments/speed). By the rules of PyTorch's documentation (CUDA semantics, "CUDA
Graphs"); not every GPU has been tried, so that a recording must prove itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

WARM_UP = 3  # steps in which libraries choose their kernels and claim memory
LEAST = 200  # steps from which on a recording pays
APART = 0.1  # of a tensor's way in a step: more than sums of changing order leave between two


class Replayed:
    """step(*inputs), recorded at its fourth call and replayed from then on.

    The step changes the tensors that state() holds, in place, and nothing else; it draws no random
    numbers and asks the host for nothing. Its inputs keep their shapes. A recording that cannot be
    made, or that takes the state elsewhere than the step itself, is told and not used.
    """

    def __init__(self, step: Callable, state: Callable[[], object], device: torch.device):
        self.step, self.state, self.device = step, state, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.calls, self.replay, self.inputs = 0, None, []

    def __call__(self, *inputs: Tensor) -> None:
        self.calls += 1
        if self.replay is not None:
            assign(self.inputs, inputs)
            self.replay()
        elif self.calls <= WARM_UP:
            self.aside(inputs)
        elif self.calls == WARM_UP + 1:
            self.try_recording(inputs)
        else:
            self.step(*inputs)

    def aside(self, inputs: tuple[Tensor, ...]) -> None:
        """The step on the recording's stream, as the rules ask of what goes before one."""
        if self.stream is None:
            return self.step(*inputs)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.step(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def try_recording(self, inputs: tuple[Tensor, ...]) -> None:
        """A recording, replayed twice from one state and held against the step, and the step."""
        state = [leaf for leaf in tree_leaves(self.state()) if isinstance(leaf, Tensor)]
        before, reason = [], ""
        try:
            before = [t.clone() for t in state]
            held = [x.clone() for x in inputs]
            replay = record(self.step, held, self.stream)
            for _ in range(2):  # the second time in memory that is not fresh
                assign(state, before)
                replay()
            replayed = [t.clone() for t in state]
        except RuntimeError as error:  # of a failed capture the cause is behind it
            reason = " ".join(str(error.__context__ or error).split())[:200]
        assign(state, before)  # raises where the device itself is lost
        self.aside(inputs)
        allowed = 0 if torch.are_deterministic_algorithms_enabled() else APART
        if not reason and not way_off(replayed, state, before) <= allowed:
            reason = "it computes something else"
        if reason:
            told = f"no CUDA graph of the training step, which is slower without: {reason}"
            tqdm.write(told, file=sys.stderr)
        else:
            self.replay, self.inputs = replay, held


def pays(steps: int, device: torch.device, scaler: torch.amp.GradScaler) -> bool:
    """On CUDA, except in short runs and in fp16, whose scaler has state on the host."""
    return device.type == "cuda" and steps >= LEAST and not scaler.is_enabled()


def record(step: Callable, inputs: list[Tensor], stream: torch.cuda.Stream) -> Callable[[], None]:
    """What computes step(*inputs) from what the inputs hold by then. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream the current one
    with torch.cuda.stream(torch.cuda.current_stream(stream.device)):
        with torch.cuda.graph(graph, stream=stream):
            step(*inputs)
    return graph.replay


def assign(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)


def way_off(state: list[Tensor], expected: list[Tensor], before: list[Tensor]) -> float:
    """How far from what is expected a tensor is, as a share of its way from before; the largest."""
    shares = []
    for tensor, right, start in zip(state, expected, before):
        apart, way = (tensor.float() - right).norm(), (right.float() - start).norm()
        shares.append(torch.where(apart == 0, apart, apart / way))
    return float(torch.stack(shares).nan_to_num(nan=torch.inf).max())
