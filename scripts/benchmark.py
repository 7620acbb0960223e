"""Train and evaluate one recipe over many categories and seeds; write one table.

Flags change the recipe. Finished runs are left alone, unfinished ones go on, those that fail are
told at the end (exit code 1). Any number of these processes share the work, over hosts too.
"""

import os
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
    recipe_values,
)
from ganomaly.config import resolve
from ganomaly.errors import UserError, exit_code, guard, leaving_at_once


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--recipe", default="paper", metavar="NAME", help="experiment [paper]")
    parser.add_argument("--experiment", metavar="NAME", help="folder to write to [the recipe's]")
    add_list_flags(parser)
    parser.add_argument("--skip-missing", action="store_true", help="do those whose data is there")
    parser.add_argument("--force", action="store_true", help="train anew, over what is there")
    add_run_flags(parser)
    add_place_flags(parser)
    parser.add_config_flags()
    args = parser.parse_args(argv)
    base = resolve({**recipe_values(parser, args), "category": None})
    folder = experiment_folder(args, args.experiment or args.recipe)
    if args.force and "WORLD_SIZE" in os.environ:  # a launcher's, or of make benchmark WORKERS=
        raise UserError("--force: each worker would train what another has just finished; one does")

    with leaving_at_once():  # imported late: --help and a wrong flag don't wait for torch
        from ganomaly import data, experiment, pipeline
        from ganomaly.device import use_device

    categories = asked_categories(args) or data.categories_of(base, args.data_root)
    missing = {}  # a dry run misses nothing that it would download
    if not (args.dry_run and args.download and base.dataset in ("mnist", "cifar10")):
        missing = data.missing_categories(base, categories, args.data_root, args.download)
    if missing and not args.skip_missing:
        raise UserError(
            f"{data.told(missing, categories)}; --skip-missing does the others. "
            f"The first: {next(iter(missing.values()))}"
        )
    categories = [name for name in categories if name not in missing]
    jobs = {
        f"{category} seed {seed}": (base.replace(category=category, seed=seed), folder)
        for seed in args.seeds or [base.seed]
        for category in categories
    }
    if not jobs:
        raise UserError(f"nothing left to do, all is missing: {next(iter(missing.values()))}")
    device = use_device(args.device, args.deterministic)
    experiment.check_recipe(folder, pipeline.with_precision(base, device))

    if args.dry_run:
        print(pipeline.with_precision(base, device).to_json() + "would:")
        return pipeline.plan_all(jobs, args.data_root, device, args.force)

    failed = pipeline.run_all(
        jobs, args.data_root, device, line_of, force=args.force, download=args.download
    )
    for name in missing:
        print(f"skipped {name}: {missing[name]}", file=sys.stderr)
    # Of a launcher's processes one tells the end; none gets here before all is done
    if (table := folder / "results.md").is_file() and os.environ.get("RANK", "0") == "0":
        print(table.read_text(encoding="utf-8"))
        pipeline.write_report(folder, folder / "report.html", args.data_root, device)
        print(f"written {folder / 'report.html'}")
    return 1 if failed or missing else 0


def line_of(metrics: dict) -> str:
    if metrics["auroc"] is None:
        return "nothing to evaluate"
    return "AUROC {auroc:.4f}, F1 {f1:.4f}, PCA-40 {auroc_pca:.4f}".format_map(metrics)


if __name__ == "__main__":
    sys.exit(exit_code(guard(main)))
