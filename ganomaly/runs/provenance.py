"""Versions, commit and command of a run."""

import ast
import datetime
import hashlib
import platform
import shlex
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import torch

from ganomaly import __version__
from ganomaly.config import ROOT, Config

# A change of these modules is not a change of code: a run's values are compared by its config.json
NOT_COMPUTING = ("__init__.py", "cli.py", "config.py", "errors.py", "files.py")


def provenance(device: torch.device, config: Config) -> dict:
    """Where a run's figures came from; no path of the machine is among it."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "threads": config.threads,
        "commit": commit(),
        "command": command(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "code": code(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # of Linux
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def code() -> dict[str, str]:
    """A hash of every module that computes, as it was when first asked.

    Comments and docstrings don't count.
    """
    here = Path(__file__).parent
    paths = [path for path in here.parent.glob("*.py") if path.name not in NOT_COMPUTING]
    hashes = {}
    everything = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    for path in sorted([*paths, here / "evaluation.py"]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                if ast.get_docstring(node) is not None:
                    del node.body[0]
        text = ast.dump(tree, **everything).replace(", type_params=[]", "")  # as Python 3.10 has it
        hashes[path.name] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return hashes


def changed_code(before: dict | None) -> str:
    """The modules that are not those of `before`, as text; empty where all are the same."""
    before, today = before or {}, code()
    return ", ".join(n for n in {**before, **today} if before.get(n) != today.get(n))


@cache
def commit() -> str | None:
    """HEAD when first asked, with +changes where the code differs; None outside of git."""
    git = partial(subprocess.check_output, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    try:
        head = git(["git", "rev-parse", "HEAD"]).strip()
        changed = git("git status --porcelain -- ganomaly scripts requirements.txt".split())
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def command(argv: list[str]) -> str:
    """The command line with the paths of this machine left out."""
    words = ["python", f"scripts/{Path(argv[0]).name}"]
    for before, word in zip(argv, argv[1:]):
        flag, equals, value = word.rpartition("=")
        if "--data-root" in (before, flag):
            value = "DATA_ROOT"
        elif Path(value).is_absolute() or ".." in Path(value).parts:
            value = Path(value).name
        words.append(flag + equals + value)
    return shlex.join(words)
