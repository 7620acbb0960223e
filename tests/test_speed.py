"""make speed: its counts against a closed form, its peers, its table."""

import json
import sys
from types import SimpleNamespace

import pytest

from .conftest import CPU, load_script
from .outputs import printed, read_json, refusal

speed = load_script("speed")


def test_a_step_costs_what_the_equations_ask_for_and_no_more():
    # Of an encoder: its first convolution, 3 x 16 x 16 to 4 x 4, its others, and its head
    first = 16 * 16 * 16 * 1 * 4
    others = 8 * 8 * 16 * 4 * 8 + 4 * 4 * 16 * 8 * 16
    head, of_d = 16 * 16 * 8, 16 * 16
    # Forward: E, its mirror, E, and D twice. D step: D's weights for x and x_hat, and what leads to
    # them, but not to the images. G step: through D's features of x_hat, then all of G's weights
    # and what leads to them, but not to x. No gradient of D's weights in the G step.
    forward = 5 * (first + others) + 3 * head + 2 * of_d
    d_step = 2 * (first + 2 * others + 2 * of_d)
    g_step = (first + others) + 6 * (first + others + head) - first
    counted = speed.multiply_adds(32, channels=1, width=4, latent_dim=8) * 1e9
    assert counted == pytest.approx(forward + d_step + g_step, rel=1e-12)


def test_a_training_is_timed_after_its_warm_up(monkeypatch, capsys):
    def train(config, images, device, run):
        for step in range(100):
            now[0] += 10 if step <= speed.WARM_UP["cpu"] else 2
            run.progress.update()

    now = [0.0]
    monkeypatch.setattr(speed, "train", train)
    monkeypatch.setattr(speed, "timer", lambda: now[0])
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    speed.time_steps("cpu", 9.0, {"batch_size": 4})
    assert json.loads(capsys.readouterr().out) == {"images_per_second": 4 / 2}


def test_peers_run_in_turn_with_ours_and_are_read_by_their_last_line(monkeypatch):
    code = "print('note\\n{\"images_per_second\": 7}')"
    assert speed.images_per_second([sys.executable, "-c", code]) == 7
    asked = []

    def images_per_second(words):
        asked.append(words[-1] if words[0] == "peer" else "ours")
        return 5.0 if words[0] == "peer" else 10.0

    monkeypatch.setattr(speed, "images_per_second", images_per_second)
    monkeypatch.setattr(speed, "multiply_adds", lambda _: 2.0)
    monkeypatch.setattr(speed, "measure_roof", lambda *_: {"amp": 40.0})
    args = dict(threads=1, repeats=2, seconds=1.0, device=CPU, peer=["peer {image_size}"])
    ours, theirs, *_ = speed.training(SimpleNamespace(**args))
    assert asked == ["ours", "64"] * 4 + ["ours", "128"] * 2
    assert ours["of_the_roof"] == 0.5 and ours["images_per_second"] == [10.0] * 2
    assert theirs["we_are_faster"] == 2 and theirs["who"] == "peer 64"


@pytest.mark.slow
def test_the_roof_is_measured_and_written_in_three_digits(script, tmp_path):
    cells = [speed.cell(value) for value in ([3.0, 1.0, 2.2222], 123.4, 0.01234)]
    assert cells == ["2.22 (1 to 3)", "123", "0.0123"]
    words = ["--only=roof", "--threads=1", "--experiments-dir", tmp_path]
    out = printed(script("speed", *words))
    (row,) = read_json(tmp_path / "local/speed.json")["roof"]["rows"]
    assert (tmp_path / "local/speed.md").read_text() in out
    assert f"| 1 | {speed.cell(row['float32'])} | {speed.cell(row['amp'])} |" in out
    for flag, message in (("--only=rof", "roof"), ("--repeats=0", "1"), ("--threads=0", "1")):
        assert message in refusal(script("speed", *words, flag))
