"""What runs and scripts leave, read back."""

import csv
import json
from pathlib import Path


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def results_of(experiment: Path) -> list[list[tuple]]:
    """results.csv, less times and provenance."""
    rows = read_csv(experiment / "results.csv")
    return [list(row.items())[: list(row).index("train_seconds")] for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbers(folder: Path) -> tuple[dict, str]:
    """A run's metrics.json less times and provenance, and its scores.csv."""
    metrics = read_json(folder / "metrics.json")
    for name in ("train_seconds", "images_per_second", "provenance"):
        del metrics[name]
    return metrics, (folder / "scores.csv").read_text()


def printed(answer: tuple[int, str, str]) -> str:
    """What a script that did its work has printed."""
    code, out, err = answer
    assert code == 0, err
    return out


def refusal(answer: tuple[int, str, str]) -> str:
    """The one line of a script that refused, and that printed nothing else."""
    code, out, err = answer
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (2, 1) and not out and "Traceback" not in err, err
    return lines[0]
