"""What each part of a recipe is worth: the recipe again without it, over sets and seeds.

ABLATIONS is the list; adding one is adding one line. Finished runs are left alone, unfinished ones
go on, any number of these processes share them. results.md: means, deviations, paired differences.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import (
    Parser,
    add_list_flags,
    add_place_flags,
    add_run_flags,
    asked_categories,
    experiment_folder,
    recipe_name,
    recipe_values,
)
from ganomaly.config import Config, resolve
from ganomaly.errors import UserError, exit_code, guard, leaving_at_once

# A name, and what it changes of the recipe: a value, or a function of the recipe
ABLATIONS = [
    ("base", {}),
    ("no adversarial loss", dict(w_adv=0.0)),
    ("no contextual loss", dict(w_con=0.0)),
    ("no encoder loss", dict(w_enc=0.0)),
    ("no running average", dict(ema_decay=0.0)),
    ("half the steps", dict(steps=lambda recipe: recipe.steps // 2)),
    ("twice the steps", dict(steps=lambda recipe: recipe.steps * 2)),
    ("float32", dict(amp="fp32")),
    ("images as they are", dict(normalise="none")),
    ("no comparator", dict(comparator_width=0)),
    ("no corruption, no comparator", dict(corrupted=0.0, comparator_width=0)),
]


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--recipe", default="calibrated", metavar="NAME", help="[calibrated]")
    parser.add_argument("--experiment", metavar="NAME", help="[local/ablations-<recipe>]")
    add_list_flags(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the ablations [all]")
    add_run_flags(parser)
    add_place_flags(parser)
    parser.add_config_flags()
    args = parser.parse_args(argv)
    name = args.experiment or f"local/ablations-{recipe_name(args)}"
    recipe = resolve({**recipe_values(parser, args), "category": None})
    names = [ablation for ablation, _ in ABLATIONS]
    if unknown := set(args.only or ()) - set(names):
        raise UserError(f"--only {unknown.pop()!r}: no such ablation; there: {', '.join(names)}")
    folder = experiment_folder(args, name)
    if (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds runs of one recipe; choose another --experiment")

    with leaving_at_once():
        from ganomaly import data
        from ganomaly.device import use_device
        from ganomaly.runs import experiment, pipeline

    categories = asked_categories(args) or data.categories_of(recipe, args.data_root)
    device = use_device(args.device, args.deterministic)
    recipe = pipeline.with_precision(recipe, device)
    chosen = {name: changed(recipe, changes) for name, changes in ABLATIONS}
    chosen = {name: config for name, config in chosen.items() if name in (args.only or names)}
    if same := [n for n, config in chosen.items() if config == recipe and n != "base"]:
        print(f"note: the recipe is without these as it is: {', '.join(same)}", file=sys.stderr)
    jobs = {}
    for seed in args.seeds or [recipe.seed]:
        for name, config in chosen.items():
            for category in categories if name not in same else []:
                one = config.replace(category=category, seed=seed)
                label = f"{name}, {data.category_name(one, args.data_root)} seed {seed}"
                jobs[label] = one, folder / slug(name)
    setting = pipeline.Setting(args.data_root, device, args.force, args.download)
    if args.dry_run:
        return pipeline.plan_all(jobs, setting)
    if missing := data.missing_categories(recipe, categories, args.data_root, args.download):
        message = data.missing_message(missing, categories)
        raise UserError(f"{message}: {next(iter(missing.values()))}")

    def line_of(metrics: dict) -> str:
        with experiment.rewriting(folder):
            write_tables(folder)
        if metrics["auroc"] is None:
            raise UserError("no test/, so nothing can be compared")
        return f"AUROC {metrics['auroc']:.4f}"

    finished, failed = pipeline.run_all(jobs, setting, line_of)
    if finished:
        categories = {metrics["category"] for metrics in finished.values()}
        seeds = {metrics["seed"] for metrics in finished.values()}
        print(markdown(*read_runs(folder, [*chosen], categories, seeds)))
        print(f"written {folder / 'results.md'}")
    return 1 if failed else 0


def slug(name: str) -> str:
    return "-".join(name.replace(",", "").split())


def changed(recipe: Config, changes: dict) -> Config:
    values = {k: v(recipe) if callable(v) else v for k, v in changes.items()}
    return recipe.replace(**values)


def read_runs(folder: Path, names=None, categories=None, seeds=None) -> tuple[dict, list[str]]:
    """(ablation, category, seed) -> metrics of the runs that are there, and their scores' names.

    All of them, or those of some ablations, categories and seeds.
    """
    from ganomaly.runs.experiment import runs_of

    def refused(error):
        print(f"warning: not in the table: {error}", file=sys.stderr)

    runs = {}
    for name in names or [name for name, _ in ABLATIONS]:
        for _, metrics, _ in runs_of(folder / slug(name), refused):
            category, seed = metrics["category"], metrics["seed"]
            asked = category in (categories or [category]) and seed in (seeds or [seed])
            if asked and metrics["auroc"] is not None:
                runs[name, category, seed] = metrics
    return runs, list(dict.fromkeys(s for m in runs.values() for s in m["scores"]))


def write_tables(folder: Path) -> None:
    """results.csv and results.md, from the metrics of all runs that are there."""
    from ganomaly.files import write_atomic
    from ganomaly.runs.results import csv_text

    runs, scores = read_runs(folder)
    rows = []
    for (name, category, seed), m in runs.items():
        base = runs.get(("base", category, seed))
        apart = None if base is None else f"{m['auroc'] - base['auroc']:.6g}"
        every = [m["scores"].get(s) for s in scores]
        every = [None if v is None else f"{v:.6g}" for v in every]
        rows.append([name, category, seed, f"{m['auroc']:.6g}", apart, *every])
    header = [
        "ablation", "category", "seed", "auroc", "difference", *(f"auroc_{s}" for s in scores),
    ]  # fmt: skip
    write_atomic(folder / "results.csv", csv_text(header, rows))
    write_atomic(folder / "results.md", markdown(runs, scores))


def markdown(runs: dict, scores: list[str]) -> str:
    from ganomaly.runs.results import spread

    categories = sorted({category for _, category, _ in runs})
    seeds = ", ".join(str(seed) for seed in sorted({seed for *_, seed in runs}))
    names = list(dict.fromkeys(name for name, *_ in runs))

    def values(name: str, category: str | None, pick) -> tuple[list[float], list[float]]:
        """The figure of an ablation's runs, and its differences to the base run's."""
        mine = {k[1:]: m for k, m in runs.items() if k[0] == name and category in (None, k[1])}
        pairs = [(pick(m), pick(runs.get(("base", *key), {}))) for key, m in mine.items()]
        figures = [a for a, _ in pairs if a is not None]
        return figures, [a - b for a, b in pairs if a is not None and b is not None]

    lines = [
        "# Ablations",
        "",
        f"AUROC of the headline score, seeds {seeds}: mean ± standard deviation, and the "
        "difference to the base run of the same category and seed.",
        "",
        *sorted({f"`{m['provenance'].get('command')}`" for m in runs.values()}),
        "",
    ]
    titles = [f"{c} | difference" for c in categories] + ["difference, all"]
    lines += [f"| ablation | {' | '.join(titles)} |", "|---" * (2 * len(categories) + 2) + "|"]
    for name in names:
        cells = []
        for category in categories:
            figures, apart = values(name, category, lambda m: m.get("auroc"))
            cells += [spread(figures), "" if name == "base" else spread(apart, "+")]
        _, apart = values(name, None, lambda m: m.get("auroc"))
        cells.append("" if name == "base" else spread(apart, "+"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Every score of the same runs, difference to the base run over all sets:", ""]
    lines += [f"| ablation | {' | '.join(scores)} |", "|---" * (len(scores) + 1) + "|"]
    for name in names:
        both = [values(name, None, lambda m, s=s: m.get("scores", {}).get(s)) for s in scores]
        cells = [spread(a) if name == "base" else spread(b, "+") for a, b in both]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(exit_code(guard(main)))
