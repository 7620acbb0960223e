"""Train GANomaly on one category and say honestly how good it is.

Without flags it trains on scikit-learn's digits, nothing to download. The run goes into
experiments/<experiment>/<category>/seed<seed>/; a finished one is left alone, an unfinished one
goes on from its checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from ganomaly import cli
from ganomaly.config import resolve
from ganomaly.device import use_device
from ganomaly.errors import flag, guard
from ganomaly.runs import pipeline
from ganomaly.runs.experiment import write_results
from ganomaly.runs.results import summary
from ganomaly.runs.run import Run


def main(argv=None) -> None:
    parser = cli.Parser(__doc__)
    cli.add_train_flags(parser)
    args = parser.parse_args(argv)
    config = resolve(cli.given_values(args))
    folder = cli.experiment_folder(args)

    device = use_device(args.device, args.deterministic)
    recipe = args.recipe or "of the defaults"
    setting = pipeline.Setting(args.data_root, device, args.force, args.download, recipe)
    if args.dry_run:
        run = pipeline.run_of(config, folder, setting)
        print(f"{run.config.to_json()}would: {pipeline.plan(run, setting)}")
        return
    with tqdm(total=config.steps, unit="step", leave=False, disable=None) as bar:
        metrics, outcome = pipeline.run_one(config, folder, setting, bar)
    write_results(folder)
    if outcome != pipeline.TRAINED:
        print(f"{outcome}; {flag('--force')} trains it anew")
    print(summary(metrics, config.quantile))
    print(f"  written   {Run(folder, metrics['category'], config).folder}")


if __name__ == "__main__":
    sys.exit(guard(main))
