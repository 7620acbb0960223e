"""What each part of a recipe is worth: the recipe again without it, over sets and seeds.

ABLATIONS is the list; adding one is adding one line. Finished runs are left alone, unfinished ones
go on, any number of these processes share them. results.md: means, deviations, paired differences.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly import cli, data
from ganomaly.config import Config, resolve
from ganomaly.device import use_device
from ganomaly.errors import UserError, exit_code, guard
from ganomaly.files import write_atomic
from ganomaly.runs.experiment import rewriting, runs_of
from ganomaly.runs.pipeline import Setting, plan_all, run_all
from ganomaly.runs.results import Page, Table, csv_text, markdown, spread
from ganomaly.training import resolve_amp

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
Runs = dict[tuple[str, str, int], dict]  # (ablation, category, seed) -> metrics


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--recipe", default="calibrated", metavar="NAME", help="[calibrated]")
    parser.add_argument("--experiment", metavar="NAME", help="[local/ablations-<recipe>]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the ablations [all]")
    cli.add_list_flags(parser)
    cli.add_run_flags(parser)
    cli.add_place_flags(parser)
    parser.add_config_flags()
    args = parser.parse_args(argv)
    experiment = args.experiment or f"local/ablations-{cli.recipe_name(args)}"
    recipe = resolve({**cli.recipe_values(parser, args), "category": None})
    names = [name for name, _ in ABLATIONS]
    if unknown := set(args.only or ()) - set(names):
        raise UserError(f"--only {unknown.pop()!r}: no such ablation; there: {', '.join(names)}")
    folder = cli.experiment_folder(args, experiment)
    if (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds runs of one recipe; choose another --experiment")

    categories = cli.asked_categories(args) or data.categories_of(recipe, args.data_root)
    device = use_device(args.device, args.deterministic)
    recipe = recipe.replace(amp=resolve_amp(recipe.amp, device))
    chosen = {n: changed(recipe, c) for n, c in ABLATIONS if n in (args.only or names)}
    if same := [name for name, config in chosen.items() if config == recipe and name != "base"]:
        print(f"note: left out, as it changes nothing: {', '.join(same)}", file=sys.stderr)
    jobs = {}
    for seed in args.seeds or [recipe.seed]:
        for name, config in chosen.items():
            for category in categories if name not in same else []:
                one = config.replace(category=category, seed=seed)
                label = f"{name}, {data.category_name(one, args.data_root)} seed {seed}"
                jobs[label] = one, folder / slug(name)
    setting = Setting(args.data_root, device, args.force, args.download)
    if args.dry_run:
        return plan_all(jobs, setting)
    if missing := data.missing_categories(recipe, categories, args.data_root, args.download):
        data.refuse_missing(missing, categories)

    def line_of(metrics: dict) -> str:
        write_tables(folder)
        if metrics["auroc"] is None:
            raise UserError("no test/, so nothing can be compared")
        return f"AUROC {metrics['auroc']:.4f}"

    finished, failed = run_all(jobs, setting, line_of)
    if finished:
        keys = {(metrics["category"], metrics["seed"]) for metrics in finished.values()}
        runs = read_runs(folder)
        print(markdown(page({k: m for k, m in runs.items() if k[0] in chosen and k[1:] in keys})))
        print(f"written {folder / 'results.md'}")
    return 1 if failed else 0


def slug(name: str) -> str:
    return "-".join(name.replace(",", "").split())


def changed(recipe: Config, changes: dict) -> Config:
    values = {k: v(recipe) if callable(v) else v for k, v in changes.items()}
    return recipe.replace(**values)


def read_runs(folder: Path) -> Runs:
    """The evaluated runs that are there."""
    runs = {}
    for name, _ in ABLATIONS:
        for _, metrics, _ in runs_of(folder / slug(name)):
            if metrics["auroc"] is not None:
                runs[name, metrics["category"], metrics["seed"]] = metrics
    return runs


def write_tables(folder: Path) -> None:
    """results.csv and results.md of all runs that are there."""
    with rewriting(folder):
        runs = read_runs(folder)
        scores = list(dict.fromkeys(s for m in runs.values() for s in m["scores"]))
        rows = []
        for (name, category, seed), m in runs.items():
            base = runs.get(("base", category, seed))
            difference = None if base is None else m["auroc"] - base["auroc"]
            every = [m["scores"].get(score) for score in scores]
            rows.append([name, category, seed, m["auroc"], difference, *every])
        header = ["ablation", "category", "seed", "auroc", "difference"]
        text = csv_text([*header, *(f"auroc_{score}" for score in scores)], rows)
        write_atomic(folder / "results.csv", text)
        write_atomic(folder / "results.md", markdown(page(runs)))


def page(runs: Runs) -> Page:
    """Means, deviations, and the differences to the base run of the same category and seed."""
    categories = sorted({category for _, category, _ in runs})
    seeds = ", ".join(str(seed) for seed in sorted({seed for *_, seed in runs}))
    names = list(dict.fromkeys(name for name, *_ in runs))
    scores = list(dict.fromkeys(s for m in runs.values() for s in m["scores"]))

    def cells(name: str, figure, of=categories) -> tuple[str, str]:
        """The spread of an ablation's figures, and that of their differences to the base."""
        mine = {key[1:]: figure(m) for key, m in runs.items() if key[0] == name and key[1] in of}
        figures = {key: value for key, value in mine.items() if value is not None}
        base = {key: figure(runs.get(("base", *key), {})) for key in figures}
        pairs = [(v, base[key]) for key, v in figures.items() if base[key] is not None]
        differences = "" if name == "base" else spread([a - b for a, b in pairs], "+")
        return spread(list(figures.values())), differences

    def auroc(m: dict):
        return m.get("auroc")

    header = ["ablation", *(title for c in categories for title in (c, "difference"))]
    rows = [
        [name, *(x for c in categories for x in cells(name, auroc, [c])), cells(name, auroc)[1]]
        for name in names
    ]
    every = []
    for name in names:
        both = [cells(name, lambda m, s=score: m.get("scores", {}).get(s)) for score in scores]
        every.append([name, *(mean if name == "base" else diff for mean, diff in both)])
    return [
        "Ablations",
        f"AUROC of the headline score, seeds {seeds}: mean ± standard deviation, and the "
        "difference to the base run of the same category and seed. The last column is over "
        "categories and seeds together.",
        "\n".join(sorted({f"`{m['provenance'].get('command')}`" for m in runs.values()})),
        Table([*header, "difference, all"], rows),
        "Every score of the same runs, difference to the base run, over categories and seeds:",
        Table(["ablation", *scores], every),
    ]


if __name__ == "__main__":
    sys.exit(exit_code(guard(main)))
