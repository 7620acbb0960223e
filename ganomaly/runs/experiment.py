"""An experiment's folder, experiments/<name>/: its recipe and the tables of its runs."""

import sys
from pathlib import Path

from ganomaly.config import EXPERIMENTS, Config, differences, load_config
from ganomaly.errors import UserError
from ganomaly.files import locked, write_atomic
from ganomaly.runs import results
from ganomaly.runs.charts import curves_svg, read_curve
from ganomaly.runs.results import ORACLE, REFERENCE, Page, markdown, recipe_of
from ganomaly.runs.run import Run, read_metrics


def write_recipe(experiment: Path, config: Config, force: bool) -> None:
    """The first run of an experiment leaves its config.json: seed 42, no category.

    `local` has none, as it holds runs of any config. With `force` it replaces another recipe. Runs
    of the old recipe stay. Until they are trained anew, the tables show no means.
    """
    path = experiment / "config.json"
    if experiment.name != "local" and (force or not path.is_file()):
        with locked(experiment, wait=True):
            write_atomic(path, recipe_of(config).to_json())


def read_runs(experiment: Path) -> list[dict]:
    """The finished runs of an experiment by seed and category: metrics, folder, config and curve.

    ORACLE is among the metrics where there is a curve. A damaged run is left out, with a warning,
    and so is one that another process is making anew meanwhile.
    """
    runs = []
    for folder in sorted(experiment.glob("*/seed*")):
        try:
            run = {**read_metrics(folder), "folder": folder}
            if not (folder / "config.json").is_file():
                raise UserError(f"{folder}: its config.json is gone")
            run["config"] = load_config(folder / "config.json")
            own = Run(experiment, run["category"], run["config"])
            if folder != own.folder:
                raise UserError(f"{folder}: a copy, of {own.name}")
            run["curve"] = read_curve(folder / "curve.csv")
            if run["score"] in run["curve"] and run["auroc"] is not None:
                run[ORACLE] = max(run["auroc"], *run["curve"][run["score"]].values())
            runs.append(run)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UserError as error:
            print(f"warning: not in the tables: {error}", file=sys.stderr)
    return sorted(runs, key=lambda run: (run["seed"], run["category"]))


def write_results(experiment: Path, recipe: str | None = None) -> None:
    """Rebuild results.csv, results.md and curves.svg from the runs. recipe: as in page_of."""
    with locked(experiment, wait=True):  # the last of several processes writes what all have done
        for path in experiment.glob(".*.tmp"):  # of a process that was killed
            path.unlink()
        runs = read_runs(experiment)
        if any(run["curve"] for run in runs):
            write_atomic(experiment / "curves.svg", curves_svg(experiment.name, runs))
        write_atomic(experiment / "results.csv", results.results_csv(runs))
        write_atomic(experiment / "results.md", markdown(page_of(experiment, runs, recipe)))


def page_of(experiment: Path, runs: list[dict], recipe: str | None = None) -> Page:
    """The results for people, beside them the committed AUROC of a recipe, if there is any.

    Without a recipe it is the one with the folder's name. Nothing stands beside the committed
    experiment itself.
    """
    folder, text = EXPERIMENTS / (recipe or experiment.name), ""
    path, elsewhere = experiment / "config.json", folder.resolve() != experiment.resolve()
    if elsewhere and path.is_file() and (there := read_runs(folder)):
        figures = {(run["category"], run["seed"]): run["auroc"] for run in there}
        for run in runs:
            run[REFERENCE] = figures.get((run["category"], run["seed"]))
        # Of a run, as the recipe itself may leave the precision to the machine
        other = ", ".join(differences(load_config(path), recipe_of(there[0]["config"])))
        text = f"reference: the AUROC of the same category and seed in experiments/{folder.name}"
        text += f", made with another config: {other}." if other else "."
    return results.results_page(experiment.name, runs, text)
