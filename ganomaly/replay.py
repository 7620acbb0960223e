"""A training step recorded as a CUDA graph and replayed: one launch instead of hundreds.

At 64 pixels an H100 takes 2.3 ms to compute a step, and Python 7.8 ms to launch its kernels
(experiments/speed). The rules are those of PyTorch's documentation (CUDA semantics, "CUDA Graphs").
Not every GPU has been tried, so each recording is compared with the step before it is used.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

WARM_UP = 3  # steps before the recording, in which libraries choose kernels and take memory
MIN_STEPS = 200  # fewer steps do not repay the recording
# Allowed deviation as a fraction of the step; larger than what nondeterministic sums cause.
ALLOWED = 0.1


class Replayed:
    """step(*inputs), recorded at its fourth call and replayed from then on.

    The step changes the tensors of state(), in place, and nothing else. It draws no random numbers
    and never waits for the device. Its inputs keep their shapes. If recording fails, or if a replay
    gives another result, a message says so, and training goes on without a graph.
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
            self.run(inputs)
        elif self.calls == WARM_UP + 1:
            self.try_recording(inputs)
        else:
            self.step(*inputs)

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        """One step without the recording, but on its stream: PyTorch asks for that beforehand."""
        if self.stream is None:
            return self.step(*inputs)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.step(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def try_recording(self, inputs: tuple[Tensor, ...]) -> None:
        """Record the step and replay it twice; run it; keep the recording if both end alike."""
        state = [leaf for leaf in tree_leaves(self.state()) if isinstance(leaf, Tensor)]
        before, reason = [], ""
        try:
            before = [t.clone() for t in state]
            held = [x.clone() for x in inputs]
            replay = record(self.step, held, self.stream)
            for _ in range(2):  # the second replay starts with memory that the first has changed
                assign(state, before)
                replay()
            replayed = [t.clone() for t in state]
        except RuntimeError as error:  # its context is the cause of a failed capture
            reason = " ".join(str(error.__context__ or error).split())[:200]
        assign(state, before)  # raises where the device itself is lost
        self.run(inputs)
        allowed = 0 if torch.are_deterministic_algorithms_enabled() else ALLOWED
        if not reason and not deviation(replayed, state, before) <= allowed:
            reason = "the recording computes something else"
        if reason:
            message = f"training runs without a CUDA graph and is slower: {reason}"
            tqdm.write(message, file=sys.stderr)
        else:
            self.replay, self.inputs = replay, held


def worth_recording(steps: int, device: torch.device) -> bool:
    """Whether to record: on CUDA, and not in short runs."""
    return device.type == "cuda" and steps >= MIN_STEPS


def record(step: Callable, inputs: list[Tensor], stream: torch.cuda.Stream) -> Callable[[], None]:
    """Record step(*inputs) without running it; returns a function that runs it on these tensors."""
    graph = torch.cuda.CUDAGraph()
    # The outer `with` restores the current stream where the capture fails
    with torch.cuda.stream(torch.cuda.current_stream(stream.device)):
        with torch.cuda.graph(graph, stream=stream):
            step(*inputs)
    return graph.replay


def assign(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)


def deviation(state: list[Tensor], expected: list[Tensor], before: list[Tensor]) -> float:
    """Largest |state - expected| / |expected - before| over the tensors."""
    shares = []
    for tensor, right, start in zip(state, expected, before):
        error, step = (tensor.float() - right).norm(), (right.float() - start).norm()
        shares.append(torch.where(error == 0, error, error / step))
    return float(torch.stack(shares).nan_to_num(nan=torch.inf).max())
