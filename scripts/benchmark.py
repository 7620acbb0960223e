"""Train and evaluate one recipe over many categories and seeds; write one table.

Flags change the recipe. Beside each AUROC stands that of the recipe's committed table. Finished
runs are left alone, unfinished ones go on, those that fail are listed at the end (exit code 1).
Any number of these processes share the work, over hosts too.
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
    note_unused_root,
    recipe_name,
    recipe_values,
)
from ganomaly.config import resolve
from ganomaly.errors import UserError, exit_code, flag, guard, leaving_at_once


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--recipe", default="paper", metavar="NAME", help="experiment [paper]")
    parser.add_argument("--experiment", metavar="NAME", help="to write to [local/<recipe>]")
    add_list_flags(parser)
    parser.add_argument("--skip-missing", action="store_true", help="do those whose data is there")
    add_run_flags(parser)
    add_place_flags(parser)
    parser.add_config_flags()
    args = parser.parse_args(argv)
    recipe = recipe_name(args)
    base = resolve({**recipe_values(parser, args), "category": None})
    folder = experiment_folder(args, args.experiment or f"local/{recipe}")
    note_unused_root(base, args)
    if args.force and "WORLD_SIZE" in os.environ:  # a launcher's, or of make benchmark WORKERS=
        raise UserError("--force: each worker would train what another has just finished; one does")

    with leaving_at_once():  # imported late: --help and a wrong flag don't wait for torch
        from ganomaly import data
        from ganomaly.device import use_device
        from ganomaly.runs import experiment, pipeline

    categories = asked_categories(args) or data.categories_of(base, args.data_root)
    missing = {}  # a dry run misses nothing that it would download
    if not (args.dry_run and args.download and base.dataset in ("mnist", "cifar10")):
        missing = data.missing_categories(base, categories, args.data_root, args.download)
    if missing and not args.skip_missing:
        raise UserError(
            f"{data.missing_message(missing, categories)}; "
            f"{flag('--skip-missing')} does the others. "
            f"The first: {next(iter(missing.values()))}"
        )
    categories = [name for name in categories if name not in missing]
    configs = [
        base.replace(category=category, seed=seed)
        for seed in args.seeds or [base.seed]
        for category in categories
    ]
    if not configs:
        raise UserError(f"nothing left to do, all is missing: {next(iter(missing.values()))}")
    jobs = {
        f"{data.category_name(config, args.data_root)} seed {config.seed}": (config, folder)
        for config in configs
    }
    device = use_device(args.device, args.deterministic)
    setting = pipeline.Setting(args.data_root, device, args.force, args.download, recipe)
    forced = pipeline.forced_by(jobs, setting)
    experiment.check_recipe(folder, pipeline.with_precision(base, device), forced)
    if args.dry_run:
        print(pipeline.with_precision(base, device).to_json() + "would:")
        return pipeline.plan_all(jobs, setting)

    finished, failed = pipeline.run_all(jobs, setting, line_of)
    for name in missing:
        print(f"skipped {name}: {missing[name]}", file=sys.stderr)
    # Of a launcher's processes one prints the table; none gets here before all is done
    if finished and os.environ.get("RANK", "0") == "0":
        keys = {(metrics["category"], metrics["seed"]) for metrics in finished.values()}
        print(experiment.markdown(folder, experiment.read_table(folder, keys), recipe))
        pipeline.write_report(folder, folder / "report.html", args.data_root, device)
        print(f"written {folder / 'report.html'}")
    return 1 if failed or missing else 0


def line_of(metrics: dict) -> str:
    if metrics["auroc"] is None:
        return "nothing to evaluate"
    return "AUROC {auroc:.4f}, F1 {f1:.4f}, PCA-40 {auroc_pca:.4f}".format_map(metrics)


if __name__ == "__main__":
    sys.exit(exit_code(guard(main)))
