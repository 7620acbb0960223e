"""make speed: its counts against a closed form, its table against its JSON."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from ganomaly.errors import UserError

from .conftest import load_script

CPU = torch.device("cpu")
TINY = dict(image_size=32, channels=1, width=4, latent_dim=8, batch_size=4, amp="fp32")
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


def test_a_training_is_timed_behind_its_warm_up(monkeypatch):
    def train(config, images, device, run):
        for step in range(100):
            now[0] += 10 if step <= speed.WARM_UP["cpu"] else 2
            run.progress.update()

    now = [0.0]
    monkeypatch.setattr(speed, "train", train)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert speed.time_steps(CPU, 9.0, TINY) == {"images_per_second": 4 / 2}


def test_peers_run_in_turn_with_ours(monkeypatch):
    asked = []

    def process(words):
        asked.append(words[-1])
        return {"images_per_second": 5.0 if words[0] == "peer" else 10.0}

    monkeypatch.setattr(speed, "process", process)
    monkeypatch.setattr(speed, "multiply_adds", lambda _: 2.0)
    table = {"roof": {"rows": [{"threads": 1, "amp": 40.0}]}}
    given = dict(threads=1, repeats=2, seconds=1.0, device=CPU)
    ours, theirs, *_ = speed.training(SimpleNamespace(**given, peer=["peer {image_size}"]), table)
    assert asked == ["cpu", "64"] * 4 + ["cpu", "128"] * 2
    assert ours["of_the_roof"] == 0.5 and ours["images_per_second"] == [10.0] * 2
    assert theirs["we_are_faster"] == 2 and theirs["who"] == "peer 64"


@pytest.mark.slow
def test_the_roof_is_measured_and_written(script, tmp_path):
    words = ["--threads=1", "--experiments-dir", tmp_path]
    code, out, err = script("speed", "--only=roof", *words)
    assert code == 0, err
    (row,) = json.loads((tmp_path / "local/speed.json").read_text())["roof"]["rows"]
    assert row["threads"] == 1 and min(row["float32"], row["amp"], row["GB"]) > 0
    assert (tmp_path / "local/speed.md").read_text() in out
    assert f"| 1 | {speed.cell(row['float32'])} |" in out
    for flag, message in (("--only=rof", "there: roof, training"), ("--repeats=0", "at least 1")):
        code, _, err = script("speed", flag, *words)
        assert code == 2 and message in err
    code, _, err = script("speed", "--only=scoring", "--experiments-dir", tmp_path / "new")
    assert code == 2 and "begin with --only roof" in err


def test_a_process_is_read_by_its_last_json_line_and_its_failure_is_named():
    code = 'print(\'{"x": 5}\\nnote\\n{"images_per_second": 7}\\n[8]\\n9\')'
    assert speed.process([sys.executable, "-c", code]) == {"images_per_second": 7}
    with pytest.raises(UserError, match="failed: ZeroDivisionError"):
        speed.process([sys.executable, "-c", "1 / 0"])


def test_cells_have_three_digits_and_a_range():
    cells = [speed.cell(x) for x in ([3.0, 1.0, 2.2222], [5.0], 123.4, 0.01234, None, "a_b")]
    assert cells == ["2.22 (1 to 3)", "5", "123", "0.0123", "", "a b"]
