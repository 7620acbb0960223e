"""The long tests: kill -9 at every write, a full disk, 50,000 steps. `make torture`, not CI."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from .conftest import ROOT, TINY_FLAGS, folder_of
from .outputs import numbers, refusal, results_of

ROOMY = ["--steps=600", "--checkpoint-every=25"]


def train(*words, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/train.py", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **more)


# A process that is killed as it is about to give its n-th file the final name
DIES = """
import os, runpy, signal, sys
left, script, replace = int(sys.argv.pop(1)), sys.argv.pop(1), os.replace
def dying(*paths):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace, sys.argv[0] = dying, script
runpy.run_path(script, run_name="__main__")
"""


def test_a_run_that_dies_at_any_of_its_writes_ends_in_the_same_bytes(fifteen, tmp_path):
    words = ["--category=bottle", "--experiment=x", "--data-root", fifteen, *TINY_FLAGS]
    words += ["--checkpoint-every=3", "--experiments-dir"]
    train(*words, tmp_path / "whole", check=True)
    n, died = 1, True
    while died:
        place = tmp_path / str(n)
        killed = [sys.executable, "-c", DIES, str(n), "scripts/train.py", *words, place]
        died = subprocess.run(killed, capture_output=True, cwd=ROOT).returncode == -signal.SIGKILL
        train(*words, place, check=True)
        whole, same = (folder_of(p, "bottle", name="x") for p in (tmp_path / "whole", place))
        assert numbers(whole) == numbers(same) and not list(place.rglob(".*.tmp"))
        assert (whole / "curve.csv").read_bytes() == (same / "curve.csv").read_bytes()
        assert results_of(tmp_path / "whole" / "x") == results_of(place / "x")
        n += 1
    print(f"died at each of {n - 2} writes")
    assert n - 2 >= 10


def test_a_launchers_dead_worker_is_replaced_and_its_runs_go_on(fifteen, tmp_path):
    which = ["--experiment=x", "--seeds", "1", "2", "--categories", "bottle", "cable", "pill"]
    where = ["--data-root", fifteen, *TINY_FLAGS, *ROOMY, "--experiments-dir"]
    script = ["scripts/benchmark.py", *which, *where]
    whole = [sys.executable, *script, tmp_path / "whole"]
    subprocess.run(whole, check=True, capture_output=True, cwd=ROOT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    process = subprocess.Popen(
        [sys.executable, *launch, "--max-restarts=3", *script, tmp_path / "shared"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not list((tmp_path / "shared").glob("x/*/seed*/last.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "going on from step" in out, out
    assert results_of(tmp_path / "whole" / "x") == results_of(tmp_path / "shared" / "x")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted, which takes root")
@pytest.mark.parametrize("kilobytes", [20, 120, 400, 700])
def test_a_full_disk_is_one_line_and_the_run_goes_on_with_more(kilobytes, fifteen, tmp_path):
    disk, roomy = tmp_path / "disk", tmp_path / "roomy"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    words = ["--category=bottle", "--data-root", fifteen, *TINY_FLAGS, *ROOMY, "--experiments-dir"]
    try:
        done = train(*words, disk)
        line = refusal((done.returncode, done.stdout, done.stderr))
        assert "No space left" in line
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        for place in (disk, roomy):
            train(*words, place, check=True)
        assert numbers(folder_of(disk, "bottle")) == numbers(folder_of(roomy, "bottle"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_fifty_thousand_steps_take_no_more_memory_and_no_longer_a_step(fifteen, tmp_path):
    words = ["--category=bottle", "--data-root", fifteen, *TINY_FLAGS, "--steps=50000"]
    command = [sys.executable, "scripts/train.py", *words, "--experiments-dir", tmp_path]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=ROOT, **quiet)
    log, memory, clock = folder_of(tmp_path, "bottle") / "log.jsonl", [], {}
    proc = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        time.sleep(1)
        try:
            ticks = len(log.read_text().splitlines())
            kilobytes = (proc / "status").read_text().split("VmRSS:")[1].split()[0]
            memory.append((ticks, int(kilobytes)))
            # The processor's time, as other work takes some of the wall's
            spent = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
            clock.setdefault(ticks, sum(map(int, spent)) / os.sysconf("SC_CLK_TCK"))
        except (OSError, IndexError):
            pass
    assert process.returncode == 0
    assert len(log.read_text().splitlines()) == 1000
    early = np.median([kb for ticks, kb in memory if 100 <= ticks < 200])
    late = np.median([kb for ticks, kb in memory if 800 <= ticks < 1000])
    at = np.interp([20, 60, 950, 990], list(clock), list(clock.values()))  # a tick is 50 steps
    first, last = (at[1] - at[0]) / 2, (at[3] - at[2]) / 2
    print(f"memory {early / 1024:.0f} then {late / 1024:.0f} MB; ", end="")
    print(f"a thousand steps {first:.2f} then {last:.2f} s")
    assert late < 1.05 * early and last < 1.1 * first
