"""Train GANomaly on one category and say honestly how good it is.

Without flags it trains on scikit-learn's digits, nothing to download. The run goes into
experiments/<experiment>/<category>/seed<seed>/; a finished one is left alone, an unfinished one
goes on from its checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser, add_place_flags, add_run_flags, experiment_folder
from ganomaly.config import resolve
from ganomaly.errors import guard, leaving_at_once


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--experiment", default="local", metavar="NAME", help="folder [local]")
    parser.add_argument("--force", action="store_true", help="train anew, over what is there")
    add_run_flags(parser)
    add_place_flags(parser)
    parser.add_config_flags()
    args = parser.parse_args(argv)
    config = resolve(parser.given(args))
    folder = experiment_folder(args, args.experiment)

    with leaving_at_once():  # imported late: --help and a wrong flag don't wait for torch
        from ganomaly import experiment, pipeline, results
        from ganomaly.device import use_device

    device = use_device(args.device, args.deterministic)
    if args.dry_run:
        print(pipeline.with_precision(config, device).to_json() + "would: ", end="")
        print(pipeline.plan(config, folder, args.data_root, device, args.force))
        return 0
    metrics, trained = pipeline.run_one(
        config, folder, args.data_root, device, force=args.force, download=args.download
    )
    experiment.write_results(folder)
    if not trained:
        print("trained already; --force trains it anew")
    print(results.summary(metrics, config.quantile))
    print(f"  written   {folder / metrics['category'] / f'seed{config.seed}'}")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
