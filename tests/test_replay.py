"""CUDA graphs without CUDA: a tape records a step's kernels and repeats them, without Python."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ganomaly import replay
from ganomaly.config import Config
from ganomaly.device import use_device
from ganomaly.training import train

from .conftest import CPU, TINY, Memory, images, same, weights

PIXELS = images(14)
LONG = Config(**{**TINY, "steps": 12, "checkpoint_every": 7})
FULL = LONG.replace(corrupted=0.5, comparator_width=4, normalise="exposure", amp="bf16")
FULL = FULL.replace(comparator_noise=0.6)
# Kernels that make the host wait for the device
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, made))
        return made

    @torch.no_grad()
    def repeat(self):
        for function, args, kwargs, made in self.calls:
            for old, new in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Makes training record as on a GPU; the list of its tapes."""
    made = []

    def record(step, inputs, stream):
        with Tape() as tape:
            step(*inputs)
        made.append(tape)
        return tape.repeat

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(replay, "worth_recording", lambda *_: True)
    return made


@pytest.mark.parametrize("config", (LONG, FULL, FULL.replace(amp="fp16")))
def test_a_replayed_training_is_the_training(config, tapes, monkeypatch):
    memory, by_step = Memory(), Memory()
    replayed = train(config, PIXELS, CPU, memory)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "worth_recording", lambda *_: False)
        expected = train(config, PIXELS, CPU, by_step)
    assert len(tapes) == 1
    assert same(replayed, expected)
    sums = [m.state(12)["sums"] for m in (memory, by_step)]
    assert sums[0] == sums[1]
    # A training that goes on from a checkpoint records anew
    assert same(expected, train(config, PIXELS, CPU, Memory(memory.saved[7])))
    assert len(tapes) == 2


@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_a_step_asks_its_host_for_nothing(amp, tapes, monkeypatch):
    held = []
    real = replay.Replayed
    monkeypatch.setattr(replay, "Replayed", lambda *a: held.append(a[1]) or real(*a))
    train(FULL.replace(amp=amp), PIXELS, CPU, Memory())
    # The compared state holds only tensors of the device
    state = [leaf for leaf in tree_leaves(held[0]()) if isinstance(leaf, torch.Tensor)]
    assert all(t.is_floating_point() or t.numel() == 1 for t in state)
    names = {function.__name__.split(".")[0] for function, *_ in tapes[0].calls}
    assert {"convolution", "convolution_backward", "_fused_adam_"} <= names
    assert not names & WAITS


@pytest.mark.parametrize(
    "error, deterministic, used",
    [(1e-6, False, True), (1e-6, True, False), (0.2, False, False)],
)
def test_a_replay_is_used_if_it_is_the_step(error, deterministic, used, monkeypatch, capsys):
    total = torch.zeros(1)

    def record(step, inputs, stream):
        return lambda: total.add_(inputs[0] * (1 + error))

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    update = replay.Replayed(lambda x: total.add_(x), lambda: total, CPU)
    for _ in range(5):
        update(torch.ones(1))
    assert (update.replay is not None) == used
    assert ("the recording computes something else" in capsys.readouterr().err) != used
    assert used or total == 5  # the recording has added nothing


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(monkeypatch, capsys):
    def refuses(step, inputs, stream):
        try:
            step(*inputs)
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(replay, "record", refuses)
    expected = train(LONG, PIXELS, CPU, Memory())
    monkeypatch.setattr(replay, "worth_recording", lambda *_: True)
    assert same(expected, train(LONG, PIXELS, CPU, Memory()))
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.endswith("not permitted when stream is capturing\n")


def test_recording_pays_on_a_gpu_in_a_long_run():
    asked = (replay.MIN_STEPS, "cuda"), (replay.MIN_STEPS, "cpu"), (replay.MIN_STEPS - 1, "cuda")
    pays = [replay.worth_recording(steps, torch.device(device)) for steps, device in asked]
    assert pays == [True, False, False]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("deterministic", (False, True))
def test_a_cuda_graph_is_the_step(amp, deterministic, monkeypatch, capsys):
    config, device = FULL.replace(amp=amp), use_device("cuda", deterministic)
    expected, start = (
        train(config.replace(steps=n), PIXELS, device, Memory()) for n in (config.steps, 3)
    )
    made, memory = [], Memory()
    real = replay.Replayed
    monkeypatch.setattr(replay, "MIN_STEPS", 1)
    monkeypatch.setattr(replay, "Replayed", lambda *a: made.append(real(*a)) or made[-1])
    replayed = train(config, PIXELS, device, memory)
    resumed = train(config, PIXELS, device, Memory(memory.saved[7]))
    assert all(m.replay is not None for m in made) and len(made) == 2, capsys.readouterr().err
    assert replay.deviation(*map(weights, (replayed, expected, start))) < replay.ALLOWED
    if deterministic:
        assert same(replayed, expected) and same(resumed, expected)
