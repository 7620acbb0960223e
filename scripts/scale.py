"""How long many runs take on many workers, by simulation: which number pays, and what limits it.

A worker does as scripts/benchmark.py: it goes down the list of runs, passes by those that are done
or that others are at, and takes the next free one. The runs' seconds are those of a finished
experiment, again and again, or --seconds. Prints, for each number of workers, the hours until the
table is there, the share of that time in which the workers trained, and how often in a second they
asked the file system; where that is more than it answers, it is the limit.
"""

import csv
import heapq
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser
from ganomaly.config import ROOT, is_name
from ganomaly.errors import UserError, guard

ASKED = 15  # calls to the file system with a path, to pass by a run (strace)


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=int, default=15, help="categories times seeds [15]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8], help="[1 2 8]")
    parser.add_argument("--experiment", default="calibrated", metavar="NAME", help="[calibrated]")
    parser.add_argument("--seconds", type=float, metavar="FLOAT", help="of a run [experiment's]")
    parser.add_argument("--start", type=float, default=3, help="seconds until a first step [3]")
    parser.add_argument("--pass-by", type=float, default=0.001, help="seconds a run [0.001]")
    args = parser.parse_args(argv)
    if min(args.runs, *args.workers) < 1:
        raise UserError("--runs, --workers: at least 1 of each")
    if args.seconds is not None and not args.seconds > 0:
        raise UserError("--seconds: more than 0")
    seconds = [args.seconds] if args.seconds else seconds_of(args.experiment)
    runs = list(itertools.islice(itertools.cycle(seconds), args.runs))
    print("| runs | workers | hours | training | file system, a second |\n|---|---|---|---|---|")
    for workers in args.workers:
        whole = makespan(runs, workers, args.start, args.pass_by)
        asked = workers * len(runs) * ASKED / whole
        print(
            f"| {len(runs):,} | {workers:,} | {whole / 3600:.2f} | "
            f"{sum(runs) / workers / whole:.0%} | {asked:,.0f} |"
        )
    return 0


def seconds_of(experiment: str) -> list[float]:
    path = ROOT / "experiments" / experiment / "results.csv"
    if not is_name(experiment) or not path.is_file():
        raise UserError(f"--experiment {experiment}: no results.csv there; or give --seconds")
    with open(path, encoding="utf-8") as file:
        found = [row.get("train_seconds") for row in csv.DictReader(file)]
    if not any(found):
        raise UserError(f"{path}: no column train_seconds; or give --seconds")
    return [float(seconds) for seconds in found if seconds]


def makespan(runs: list[float], workers: int, start: float, pass_by: float) -> float:
    """Seconds until all workers know that all runs are done.

    runs: seconds each, in the order of the list; a worker passes each run of it once.
    """
    free = [(start, 0) for _ in range(workers)]  # when a worker is free, how far down it is
    for number, seconds in enumerate(runs, 1):
        now, passed = heapq.heappop(free)
        heapq.heappush(free, (now + (number - 1 - passed) * pass_by + seconds, number))
    return max(now + (len(runs) - passed) * pass_by for now, passed in free)


if __name__ == "__main__":
    sys.exit(guard(main))
