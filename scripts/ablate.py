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
from ganomaly.errors import UserError, guard
from ganomaly.files import locked, write_atomic
from ganomaly.runs.experiment import read_runs
from ganomaly.runs.pipeline import Setting, plan_all, run_all
from ganomaly.runs.results import Page, csv_text, markdown, one_recipe, score_columns, spread
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
    ("no test-time augmentation", dict(tta=False)),
    ("no comparator", dict(comparator_width=0)),
    ("no corruption, no comparator", dict(corrupted=0.0, comparator_width=0)),
]
Runs = dict[tuple[str, str, int], dict]  # (ablation, category, seed) -> flat metrics


def main(argv=None) -> int:
    parser, names = cli.Parser(__doc__), [name for name, _ in ABLATIONS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help="ablations [all]"
    )
    cli.add_list_flags(parser)
    cli.add_train_flags(parser, "local/ablations-<recipe>", "calibrated")
    args = parser.parse_args(argv)
    recipe = resolve({**cli.given_values(args), "category": None})
    folder = cli.experiment_folder(args)
    if (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds runs of one recipe; choose another --experiment")

    categories = cli.asked_categories(args) or data.categories_of(recipe, args.data_root)
    device = use_device(args.device, args.deterministic)
    recipe = recipe.replace(amp=resolve_amp(recipe.amp, device))
    chosen = {n: changed(recipe, c) for n, c in ABLATIONS if n in args.only}
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
    data.missing(recipe, categories, args.data_root, args.download)

    finished, failed = run_all(jobs, setting)
    evaluated = [metrics for metrics in finished.values() if metrics["auroc"] is not None]
    if evaluated:
        keys = {(metrics["category"], metrics["seed"]) for metrics in evaluated}
        runs = write_tables(folder)
        shown = {"base", *chosen}
        print(markdown(page({k: m for k, m in runs.items() if k[0] in shown and k[1:] in keys})))
        print(f"written {folder / 'results.md'}")
    return 1 if failed or len(evaluated) < len(finished) else 0


def slug(name: str) -> str:
    return "-".join(name.replace(",", "").split())


def changed(recipe: Config, changes: dict) -> Config:
    return recipe.replace(**{k: v(recipe) if callable(v) else v for k, v in changes.items()})


def write_tables(folder: Path) -> Runs:
    """results.csv and results.md of all evaluated runs that are there; returns these runs."""
    runs, bases = {}, {}
    with locked(folder, wait=True):
        for name, changes in ABLATIONS:
            for run in read_runs(folder / slug(name)):
                key = run["category"], run["seed"]
                if name == "base":
                    bases[key] = run
                if base := bases.get(key):
                    base = {**base, "config": changed(base["config"], changes)}
                if base and not one_recipe([run, base]):
                    text = "made of another recipe or other images than its base run"
                    print(f"warning: not in the table: {run['folder']}: {text}", file=sys.stderr)
                elif run["auroc"] is not None:
                    runs[(name, *key)] = run
        scores, rows = score_columns(runs.values()), []
        for (name, category, seed), m in runs.items():
            base = runs.get(("base", category, seed))
            difference = None if base is None else m["auroc"] - base["auroc"]
            every = [m.get(score) for score in scores]
            rows.append([name, category, seed, m["auroc"], difference, *every])
        header = ["ablation", "category", "seed", "auroc", "difference", *scores]
        write_atomic(folder / "results.csv", csv_text(header, rows))
        write_atomic(folder / "results.md", markdown(page(runs)))
    return runs


def page(runs: Runs) -> Page:
    categories = sorted({category for _, category, _ in runs})
    seeds = ", ".join(str(seed) for seed in sorted({seed for *_, seed in runs}))
    names = list(dict.fromkeys(name for name, *_ in runs))
    scores = score_columns(runs.values())

    def cells(name: str, key: str, of=categories) -> tuple[str, str]:
        """The spread of an ablation's figures, and that of their differences to the base."""
        mine = {k[1:]: m[key] for k, m in runs.items() if k[0] == name and k[1] in of and key in m}
        base = {k: runs[("base", *k)] for k in mine if ("base", *k) in runs}
        differences = [mine[k] - m[key] for k, m in base.items() if key in m]
        return spread([*mine.values()]), "" if name == "base" else spread(differences, "+")

    header = ["ablation", *(title for c in categories for title in (c, "difference"))]
    rows = [
        [name, *(x for c in categories for x in cells(name, "auroc", [c])), cells(name, "auroc")[1]]
        for name in names
    ]
    every = [[name, *(cells(name, key)[name != "base"] for key in scores)] for name in names]
    return [
        "Ablations",
        f"AUROC of the headline score, seeds {seeds}: mean ± standard deviation, and the "
        "difference to the base run of the same category and seed. The last column is over "
        "categories and seeds together.",
        "\n".join(sorted({f"`{m.get('command')}`" for m in runs.values()})),
        ([*header, "difference, all"], rows),
        "Every score of the same runs, difference to the base run, over categories and seeds:",
        (["ablation", *(key.removeprefix("auroc_") for key in scores)], every),
    ]


if __name__ == "__main__":
    sys.exit(guard(main))
