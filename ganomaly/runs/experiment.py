"""An experiment's folder, experiments/<name>/: its recipe and the tables of its runs."""

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ganomaly.config import EXPERIMENTS, Config, differences, load_config
from ganomaly.errors import UserError
from ganomaly.files import locked, write_atomic
from ganomaly.runs.charts import Curve, curves_svg, read_curve
from ganomaly.runs.results import ORACLE, REFERENCE, Page, markdown, results_csv, results_page
from ganomaly.runs.run import ANEW, read_metrics, run_folder

SCRATCH = "local"  # the experiment of make train holds runs of any config


def check_recipe(experiment: Path, config: Config) -> None:
    """A named experiment holds runs of one recipe; UserError where this config is another."""
    path = experiment / "config.json"
    if experiment.name == SCRATCH or not path.is_file():
        return
    if changed := differences(recipe_of(config), recipe_of(load_config(path))):
        raise UserError(f"{path} is another recipe: {', '.join(changed)}; {ANEW}")


def write_recipe(experiment: Path, config: Config, force: bool) -> None:
    """The first run of a named experiment leaves its config.json: seed 42, no category.

    With `force` it replaces another recipe. Runs of the old recipe stay. Until they are trained
    anew, the tables show no means.
    """
    path = experiment / "config.json"
    if experiment.name != SCRATCH and (force or not path.is_file()):
        with locked(experiment, wait=True):
            write_atomic(path, recipe_of(config).to_json())


def recipe_of(config: Config) -> Config:
    """What runs of one recipe have in common."""
    return config.replace(category=None, seed=42)


@dataclass
class Results:
    """What the tables of an experiment are made of."""

    runs: list[dict]  # metrics, by seed and category; ORACLE among them where there is a curve
    one_recipe: bool  # and of the same test images; if not, as in `local`, there are no means
    curves: dict[str, list[Curve]]  # by category, one a seed


def read_results(experiment: Path, only: Collection[tuple[str, int]] | None = None) -> Results:
    """The finished runs of an experiment, or those of them whose category and seed `only` has."""
    results, recipes = Results([], True, {}), []
    for run, metrics, config in runs_of(experiment):
        if only is not None and (metrics["category"], metrics["seed"]) not in only:
            continue
        results.runs.append(metrics)
        recipes.append(recipe_of(config))
        if curve := read_curve(run / "curve.csv"):
            results.curves.setdefault(run.parent.name, []).append(curve)
            if metrics["score"] in curve and metrics["auroc"] is not None:
                metrics[ORACLE] = max(metrics["auroc"], *curve[metrics["score"]].values())
    results.runs.sort(key=lambda m: (m["seed"], m["category"]))
    test_sets = {(m["category"], m["provenance"].get("test_images")) for m in results.runs}
    one_set = len(test_sets) == len({m["category"] for m in results.runs})
    results.one_recipe = one_set and not any(differences(one, recipes[0]) for one in recipes)
    return results


def runs_of(experiment: Path) -> Iterator[tuple[Path, dict, Config]]:
    """Folder, metrics and config of every finished run, with a warning of damaged ones.

    A run that another process is making anew meanwhile is left out.
    """
    for path in sorted(experiment.glob("*/seed*/metrics.json")):
        try:
            metrics = read_metrics(path)
            config = load_config(path.with_name("config.json"))
            name, seed = metrics["category"], metrics["seed"]
            if path.parent != run_folder(experiment, name, seed):
                raise UserError(f"{path.parent}: a copy, of {name} seed {seed}")
            yield path.parent, metrics, config
        except FileNotFoundError:
            continue
        except UserError as error:
            print(f"warning: not in the tables: {error}", file=sys.stderr)


def write_results(experiment: Path, recipe: str | None = None) -> None:
    """Rebuild results.csv, results.md and curves.svg from the runs. recipe: as in page_of."""
    with locked(experiment, wait=True):  # the last of several processes writes what all have done
        for path in experiment.glob(".*.tmp"):  # of a process that was killed
            path.unlink()
        results = read_results(experiment)
        if results.curves:
            write_atomic(experiment / "curves.svg", curves_svg(experiment.name, results.curves))
        write_atomic(experiment / "results.csv", results_csv(results.runs, results.one_recipe))
        write_atomic(experiment / "results.md", markdown(page_of(experiment, results, recipe)))


def page_of(experiment: Path, results: Results, recipe: str | None = None) -> Page:
    """The results for people, beside them the committed AUROC of a recipe, if there is any.

    Without a recipe it is the one with the folder's name. Nothing stands beside the committed
    experiment itself.
    """
    folder, text = EXPERIMENTS / (recipe or experiment.name), ""
    path, elsewhere = experiment / "config.json", folder.resolve() != experiment.resolve()
    if elsewhere and path.is_file() and (there := list(runs_of(folder))):
        figures = {(m["category"], m["seed"]): m["auroc"] for _, m, _ in there}
        for run in results.runs:
            run[REFERENCE] = figures.get((run["category"], run["seed"]))
        _, _, config = there[0]  # the recipe itself may leave the precision to the machine
        other = ", ".join(differences(load_config(path), recipe_of(config)))
        text = f"reference: the AUROC of the same category and seed in experiments/{folder.name}"
        text += f", made with another config: {other}." if other else "."
    return results_page(experiment.name, results.runs, results.one_recipe, text)
