"""Train GANomaly on one category and say honestly how good it is.

Without flags it trains on scikit-learn's digits, nothing to download. The run goes into
experiments/<experiment>/<category>/seed<seed>/; a finished one is left alone, an unfinished one
goes on from its checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import (
    Parser,
    add_place_flags,
    add_run_flags,
    experiment_folder,
    note_unused_root,
    recipe_values,
)
from ganomaly.config import resolve
from ganomaly.errors import flag, guard, leaving_at_once


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--recipe", metavar="NAME", help="of experiments/ [the defaults below]")
    parser.add_argument("--experiment", default="local", metavar="NAME", help="folder [local]")
    add_run_flags(parser)
    add_place_flags(parser)
    parser.add_config_flags()
    args = parser.parse_args(argv)
    config = resolve(recipe_values(parser, args))
    folder = experiment_folder(args, args.experiment)
    note_unused_root(config, args)

    with leaving_at_once():  # imported late: --help and a wrong flag don't wait for torch
        from ganomaly.device import use_device
        from ganomaly.runs import experiment, pipeline, results

    device = use_device(args.device, args.deterministic)
    setting = pipeline.Setting(args.data_root, device, args.force, args.download)
    if args.dry_run:
        print(pipeline.with_precision(config, device).to_json() + "would: ", end="")
        print(pipeline.plan(config, folder, setting))
        return 0
    metrics, outcome = pipeline.run_one(config, folder, setting)
    experiment.write_results(folder)
    if outcome == pipeline.BEFORE:
        print(f"trained already; {flag('--force')} trains it anew")
    elif outcome == pipeline.AGAIN:
        print("trained already; its test images changed, so it was evaluated again")
    print(results.summary(metrics, config.quantile))
    print(f"  written   {folder / metrics['category'] / f'seed{config.seed}'}")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
