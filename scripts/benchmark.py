"""Train and evaluate one recipe over many categories and seeds; write one table.

Flags change the recipe. Beside each AUROC stands that of the recipe's committed table. Finished
runs are left alone, unfinished ones go on, those that fail are listed at the end (exit code 1).
Any number of these processes share the work, over hosts too.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly import cli, data
from ganomaly.config import FOLDERS, resolve
from ganomaly.device import use_device
from ganomaly.errors import UserError, guard
from ganomaly.files import locked, write_atomic
from ganomaly.runs import experiment, pipeline
from ganomaly.runs.report import report_page
from ganomaly.runs.results import markdown


def main(argv=None) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("--skip-missing", action="store_true", help="do those whose data is there")
    cli.add_list_flags(parser)
    cli.add_train_flags(parser, "local/<recipe>", "paper")
    args = parser.parse_args(argv)
    base = resolve({**cli.given_values(args), "category": None})
    folder = cli.experiment_folder(args)
    if args.force and "WORLD_SIZE" in os.environ:  # a launcher's, or of make benchmark WORKERS=
        raise UserError("--force: several workers would train each other's runs anew; use one")

    categories = cli.asked_categories(args) or data.categories_of(base, args.data_root)
    missing = {}  # in a dry run, images that would be downloaded are not missing
    if not (args.dry_run and args.download and base.dataset not in FOLDERS):
        missing = data.missing(base, categories, args.data_root, args.download, args.skip_missing)
    jobs = {}
    for seed in args.seeds or [base.seed]:
        for category in (name for name in categories if name not in missing):
            config = base.replace(category=category, seed=seed)
            jobs[f"{data.category_name(config, args.data_root)} seed {seed}"] = config, folder
    device = use_device(args.device, args.deterministic)
    setting = pipeline.Setting(args.data_root, device, args.force, args.download, args.recipe)
    first, _ = next(iter(jobs.values()))
    run = pipeline.run_of(first, folder, setting)  # refuses at once a folder of another recipe
    if args.dry_run:
        print(run.config.replace(category=None).to_json() + "would:")
        finished, failed = {}, pipeline.plan_all(jobs, setting)
    else:
        finished, failed = pipeline.run_all(jobs, setting)
    for name in missing:
        print(f"skipped {name}: {missing[name]}", file=sys.stderr)
    # Of a launcher's processes one prints the table; none gets here before all is done
    if finished and os.environ.get("RANK", "0") == "0":
        keys = {(metrics["category"], metrics["seed"]) for metrics in finished.values()}
        runs = experiment.read_runs(folder)
        runs = [run for run in runs if (run["category"], run["seed"]) in keys]
        print(markdown(experiment.page_of(folder, runs, args.recipe)))
        page = report_page(folder, args.data_root, device)
        with locked(folder, wait=True):  # another process may remove what is half written
            write_atomic(folder / "report.html", page)
        print(f"written {folder / 'report.html'}")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(guard(main))
