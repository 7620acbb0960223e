"""A stranger with a pristine clone: the commands of the READMEs, and their recipes for changes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ganomaly.training import resolve_amp

from .conftest import ROOT, TINY_FLAGS, committed, load_script, train

pytestmark = pytest.mark.slow
GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
TRAINS = ("train", "benchmark", "ablate")
# What a test cannot run: make has to accept the words at least
NOT_RUN = ("download", "speed", "board", "test", "torture", "help")
# Runs scripts/<name>.py and its words, a line each, in one process: starting one takes seconds
RUN_LINES = """
import importlib, shlex, sys
from ganomaly.errors import guard
for line in sys.stdin:
    _, script, *words = shlex.split(line)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    print("exit code", guard(module.main, words))
"""


def git(*words, cwd) -> str:
    return subprocess.check_output([*GIT, *words], cwd=cwd, text=True)


@pytest.fixture
def clone(fifteen, tmp_path) -> Path:
    """A clone, whose only commit has what is not committed yet too; MVTec AD's images in data/."""
    folder = tmp_path / "clone"
    for path in committed("--cached", "--others", "--exclude-standard"):
        if path.is_file():
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    git("init", "-q", cwd=folder)
    git("add", "-A", cwd=folder)
    git("commit", "-q", "-m", "as in the working tree", cwd=folder)
    (folder / "data").mkdir()
    (folder / "data/mvtec").symlink_to(fifteen)
    return folder


def make(clone: Path, words: list[str], timeout=300) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", "--no-print-directory", f"PYTHON={sys.executable}", *words], cwd=clone, text=True,
        capture_output=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def made(clone: Path, commands: list[list[str]]) -> list[str]:
    """What each of some commands prints, two at a time; all have to succeed."""
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda words: make(clone, words), commands))
    for words, one in zip(commands, done):
        assert one.returncode == 0, (words, one.stderr)
    return [one.stdout for one in done]


def commands() -> list[str]:
    """Every make command of the two READMEs, once."""
    found = []
    for page in ("README.md", "experiments/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        text = re.sub(r"<[^<>]*>", "FOLDER", text)
        found += re.findall(r"^    (make [^#\n]*)", text, re.M)
        found += re.findall(r"`(make [^`]*)`", text)
    return list(dict.fromkeys(" ".join(command.split()) for command in found))


def runnable(command: str) -> list[str]:
    """The words of a command, with drawn images for its folder, as a dry run where it trains."""
    target, *words = shlex.split(command)[1:]
    given = dict(word.split("=", 1) for word in words)
    if target in TRAINS:
        given["ARGS"] = f"{given.get('ARGS', '')} --dry-run".strip()
        given.pop("WORKERS", None)  # a launcher's start takes longer than all others together
        if "DATA_ROOT" in given:
            given["DATA_ROOT"] = "data/mvtec"
        if "solar_cells" in given.get("CATEGORIES", ""):
            given["CATEGORIES"] = "bottle screw"  # the drawn ones have MVTec AD's names
    return [target, *(f"{name}={value}" for name, value in given.items())]


def test_every_command_of_the_readmes_runs_in_a_pristine_clone(clone):
    text = (clone / "README.md").read_text(encoding="utf-8")
    drawing = re.search(r"^    .venv/bin/python - <<'END'\n(.*?)^    END$", text, re.M | re.S)[1]
    subprocess.run([sys.executable, "-c", textwrap.dedent(drawing)], cwd=clone, check=True)
    assert len(list(clone.glob("data/parts/*.png"))) == 120
    found = commands()
    assert len(found) > 20 and {c.split()[1] for c in found} >= {*TRAINS, "predict", "report"}
    rest, dry = [], []
    for command in found:
        target, *words = shlex.split(command)[1:]
        if target in TRAINS:
            dry.append(["-n", *runnable(command)])
        elif words and target not in NOT_RUN:
            rest.append(runnable(command))
        else:
            made(clone, [["-n", target, *words]])
    lines = "".join(made(clone, dry))
    words = [sys.executable, "-c", RUN_LINES]
    done = subprocess.run(words, input=lines, cwd=clone, capture_output=True, text=True)
    *printed, after = done.stdout.split("exit code 0\n")
    assert len(printed) == len(dry) and not after, done.stderr
    assert all("would" in out or "train" in out for out in printed)
    # What the others take: finished runs
    train(clone / "data", clone / "experiments")
    for name in ("local", "ours"):
        more = ["--dataset=mvtec", f"--experiment={name}"]
        train(clone / "data/mvtec", clone / "experiments", *more, category="bottle")
    made(clone, rest)
    made(clone, [["evaluate", "CATEGORY=parts"]])  # a run knows its own data set
    assert git("status", "--porcelain", cwd=clone) == ""


def test_the_cards_commands_run_bare_and_touch_no_committed_file(clone):
    small = f"ARGS={shlex.join(flag for flag in TINY_FLAGS if '--amp' not in flag)}"
    runs = (["benchmark"], ["ablate", "CATEGORIES=bottle"], ["train", "CATEGORY=bottle"])
    local = clone / "experiments" / "local"
    table, ablated, trained = made(clone, [[*run, small] for run in runs])
    assert "| Mean without screw |" in table
    assert "made with another config: image_size (64 there, 32 asked)" in table
    assert "| no encoder loss |" in ablated and "bottle seed 42: " in trained
    assert git("status", "--porcelain", cwd=clone) == ""
    assert len(list(local.glob("paper/*/seed42/model.pt"))) == 15
    ablations = list(local.glob("ablations-calibrated/*/bottle/seed42/model.pt"))
    fp32 = resolve_amp("auto", torch.device("cpu")) == "fp32"  # then `float32` is no ablation
    assert len(ablations) == len(load_script("ablate").ABLATIONS) - fp32
    # The user's table is what was asked for, whatever else is in the folder
    (some,) = made(clone, [["benchmark", "CATEGORIES=tile wood", small]])
    assert some.count("(done before)") == 2
    assert "| Mean of 2 |" in some and "| bottle |" not in some


def apply_recipes(clone: Path) -> None:
    """What README's section on research tells: a loss, a knob, a score, an ablation."""
    loss = '''def edges(x: Tensor, x_hat: Tensor) -> Tensor:
    """L_edge = mean |dx - dx_hat|"""
    return contextual(x.diff(dim=3), x_hat.diff(dim=3))


'''
    term = '            "edges": (config.w_edges, losses.edges(x, x_hat)),\n'
    knob = '    w_edges: float = knob(0.0, "weight of the loss of edges", low=0)\n'
    rim = '    "rim": lambda o: (o.x - o.x_hat)[..., 0].abs().mean((1, 2)),\n'
    for name, new, before in (  # which is there once
        ("ganomaly/losses.py", loss, "def discriminator("),
        ("ganomaly/training.py", term, "        }\n        loss_g"),
        ("ganomaly/config.py", knob, "    amp: str"),
        ("tests/conftest.py", '"w_edges": 9.0, ', '"threads": 2,'),
        ("ganomaly/scoring.py", rim, '    "contextual": lambda'),
        ("scripts/ablate.py", '    ("slow", dict(lr=1e-5)),\n', '    ("float32",'),
    ):
        text = (clone / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, (name, before)
        (clone / name).write_text(text.replace(before, new + before), encoding="utf-8")


def test_the_suite_passes_after_the_readmes_recipes_and_beside_a_users_runs(clone):
    apply_recipes(clone)
    words = [f"ARGS={' '.join(TINY_FLAGS)} --w-edges 3"]
    runs = (["train", "CATEGORY=bottle"], ["benchmark", "CATEGORIES=bottle", "EXPERIMENT=edges"])
    made(clone, [[*run, *words] for run in runs])
    words[-1] += " --only base slow"
    assert "slow" in make(clone, ["ablate", "CATEGORIES=bottle", *words, "DEVICE=cpu"]).stdout
    # The tests that read what was changed
    files = [f"tests/test_{name}.py" for name in ("config", "scoring", "training")]
    files += ["tests/test_benchmark.py::test_every_ablation_changes_the_recipe"]
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *files]
    done = subprocess.run(words, cwd=clone, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]


def test_make_refuses_a_variable_that_it_does_not_know():
    for words, name in (
        (["train", "category=bottle"], "category"),
        (["evaluate", "RECIPE=paper"], "RECIPE"),
        (["test", "EXPERIMENT=x"], "EXPERIMENT"),
    ):
        done = make(ROOT, ["-n", *words])
        assert done.returncode == 2 and f"does not know {name}=" in done.stderr
