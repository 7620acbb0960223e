"""Counts against a closed form, times against a clock that the test sets."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ganomaly import measure
from ganomaly.config import Config
from ganomaly.errors import UserError
from ganomaly.training import train

from .conftest import load_script

CPU = torch.device("cpu")


def multiply_adds(size: int, channels: int, width: int, head: int) -> tuple[int, ...]:
    """Of one encoder and one image: its first convolution, the others, its head."""
    side, plan = size // 2, [width]
    first, others = side * side * 16 * channels * width, 0
    while side > 4:
        side //= 2
        others += side * side * 16 * plan[-1] * plan[-1] * 2
        plan.append(plan[-1] * 2)
    return first, others, 16 * plan[-1] * head


@pytest.mark.parametrize(("size", "width", "latent"), [(32, 4, 8), (64, 6, 10)])
def test_a_step_costs_what_the_equations_ask_for_and_no_more(size, width, latent):
    values = dict(
        dataset="folder", image_size=size, channels=1, width=width, latent_dim=latent, amp="fp32"
    )
    first, others, head = multiply_adds(size, 1, width, latent)
    of_d = multiply_adds(size, 1, width, 1)[2]
    # Forward: E, its mirror, E, and D twice. D step: D's weights for x and x_hat, and what leads to
    # them, but not to the images. G step: through D's features of x_hat, then all of G's weights
    # and what leads to them, but not to x. No gradient of D's weights in the G step.
    forward = 5 * (first + others) + 3 * head + 2 * of_d
    d_step = 2 * (first + 2 * others + 2 * of_d)
    g_step = (first + others) + 6 * (first + others + head) - first
    assert measure.training_count(values) * 1e9 == pytest.approx(
        forward + d_step + g_step, rel=1e-12
    )


def test_a_stopwatch_counts_the_steps_after_the_warm_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = measure.Stopwatch(CPU, seconds=4.0, warm_up=2, windows=2, least=2)
    with pytest.raises(measure.Enough):
        for seconds in (10, 10, 1, 1, 3, 7, 1):  # two slow steps, a window of three, one of two
            now[0] += seconds
            watch.update()
    assert watch.speeds == [3 / 5, 2 / 8]


def test_paragraphs_are_told_by_their_comments(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    def linear():
        def three():
            # Three: in a function
            spend(100)

        # One: with an explanation
        # of two lines
        spend(1)
        for _ in range(2):
            # Two, inside
            spend(10)

            spend(20)
        # One
        spend(3)
        three()

    with measure.Paragraphs(linear, CPU) as inside:
        linear()
    assert sys.gettrace() is None
    assert {k: v for k, v in inside.seconds.items() if v} == {"One": 4, "Two": 60, "Three": 100}


def test_the_profile_knows_the_paragraphs_of_training():
    titles = set(measure.Paragraphs(train, CPU).titles.values())
    assert {*measure.ONCE, *measure.AT_CHECKPOINTS, "D step", "G step"} <= titles


def test_speed_of_training_and_scoring_are_told(monkeypatch):
    tiny = dict(dataset="folder", image_size=32, width=4, latent_dim=8, batch_size=4, amp="fp32")
    found = measure.training(CPU, tiny, 8, 0.05, windows=2)
    assert len(found["images_per_second"]) == 2 and min(found["images_per_second"]) > 0
    monkeypatch.setattr(measure, "load_recipe", lambda _: Config(**tiny))
    found = measure.scoring(CPU, "paper", 0.05, windows=2)
    assert all(0 < median <= p99 for median, p99 in zip(found["median"], found["p99"], strict=True))
    first, others, head = multiply_adds(32, 3, 4, 8)
    networks = 5 * (first + others) + 3 * head  # the discriminator's features of both images
    # The maps' own small filters are counted with it
    assert networks < found["G_multiply_adds"] * 1e9 < networks + 32 * 32 * 300


def test_the_speed_table_is_read_off_its_json(script, tmp_path):
    code, out, err = script("speed", "--only=roof", "--threads=1", "--experiments-dir", tmp_path)
    assert code == 0, err
    table = json.loads((tmp_path / "local/speed.json").read_text())
    (row,) = table["roof"]["rows"]
    assert row["threads"] == 1 and min(row["float32"], row["amp"], row["GB"]) > 0
    assert (tmp_path / "local/speed.md").read_text() in out
    assert f"| 1 | {load_script('speed').cell(row['float32'])} |" in out
    code, _, err = script("speed", "--only=rof", "--experiments-dir", tmp_path)
    assert code == 2 and "no such part; there: roof, training" in err


def test_ours_is_measured_in_one_process_but_in_turn_beside_a_peer(monkeypatch):
    speed, asked = load_script("speed"), []

    def process(words):
        asked.append(words)
        if words[0] == "peer":
            assert words[1] in ("64", "128")
            return {"images_per_second": 5.0, "peak_MB": 1.0}
        given = json.loads(words[words.index("--job") + 1])
        found = {"images_per_second": [10.0] * given["windows"], "peak_MB": 2.0}
        return found | ({"peak_GPU_MB": 3.0} if "cuda:0" in words else {})

    monkeypatch.setattr(speed, "process", process)
    monkeypatch.setattr(speed, "multiply_adds", lambda *_, **__: 2.0)
    table = {"roof": {"rows": [{"threads": 1, "amp": 40.0}]}}
    given = dict(threads=1, repeats=3, seconds=1.0, device="cpu")
    rows = speed.training(SimpleNamespace(**given, peer=[]), table)
    assert len(asked) == len(rows) == len(speed.SHAPES)
    assert rows[0]["images_per_second"] == [10.0] * 3 and rows[0]["of_the_roof"] == 0.5
    asked.clear()
    rows = speed.training(SimpleNamespace(**given, peer=["peer {image_size}"]), table)
    assert [words[0] == "peer" for words in asked] == [False, True] * 3 * len(speed.SHAPES)
    assert [row.get("we_are_faster") for row in rows[:2]] == [None, 2.0]
    assert rows[0]["images_per_second"] == [10.0] * 3 and rows[1]["peak_MB"] == [1.0] * 3
    given |= dict(device="cuda:0", peer=[])
    rows = speed.training(SimpleNamespace(**given), table)
    assert [row["image_size"] for row in rows] == [64, 64, 128, 256]
    rows += speed.growth(SimpleNamespace(**given), table)
    assert all((row["peak_MB"], row["peak_GPU_MB"]) in ((2.0, 3.0), ([2.0], [3.0])) for row in rows)


def test_the_table_without_a_roof_says_what_to_measure_first(script, tmp_path):
    code, _, err = script(
        "speed", "--only=scoring", "--repeats=1", "--seconds=0.1", "--experiments-dir", tmp_path
    )
    assert code == 2 and "begin with --only roof" in err


def test_a_process_is_read_by_its_last_json_line_and_its_failure_told():
    speed = load_script("speed")
    code = (
        'import time; print("note"); print(\'{"images_per_second": 7}\');'
        "x = bytearray(80_000_000); time.sleep(.2)"
    )
    found = speed.process([sys.executable, "-c", code])
    assert found["images_per_second"] == 7 and 80 < found["peak_MB"] < 120
    with pytest.raises(UserError, match="failed: ZeroDivisionError"):
        speed.process([sys.executable, "-c", "1 / 0"])


def test_cells_have_three_digits_and_a_range():
    cell = load_script("speed").cell
    assert cell([3.0, 1.0, 2.2222]) == "2.22 (1 to 3)"
    assert [cell(x) for x in (123.4, 0.01234, None, "a_b", [5.0])] == [
        "123",
        "0.0123",
        "",
        "a b",
        "5",
    ]
