"""Score a finished run again from its model.pt and rewrite its numbers (identical ones).

The run is found by --experiment, --category and --seed; it keeps its own config, and other config
flags are refused where they differ from it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser, add_place_flags, experiment_folder
from ganomaly.config import resolve
from ganomaly.errors import UserError, guard, leaving_at_once


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--experiment", default="local", metavar="NAME", help="folder [local]")
    add_place_flags(parser)
    parser.add_config_flags()
    args = parser.parse_args(argv)
    given = parser.given(args)
    asked = resolve(given)
    folder = experiment_folder(args, args.experiment)

    with leaving_at_once():  # imported late: --help and a wrong flag don't wait for torch
        from ganomaly import config as configuration
        from ganomaly import data
        from ganomaly.device import use_device
        from ganomaly.files import locked
        from ganomaly.runs import experiment, pipeline, results

    run = experiment.Run(folder, data.category_name(asked, args.data_root), asked)
    with locked(run.folder):  # before it is read: another process may be training it anew
        if not run.finished:
            raise UserError(
                f"{run.folder}: no finished run there, with model.pt (which git does not keep) and "
                "metrics.json; train it into this experiment first"
            )
        config = configuration.load(run.path("config.json"))
        for name, value in given.items():
            if value not in (None, "auto") and value != getattr(config, name):
                raise UserError(f"{name}: {run.folder} has {getattr(config, name)}, not {value}")
        before = experiment.read_metrics(run.path("metrics.json"))
        root = data.data_root_of(asked.dataset, args.data_root)
        setting = pipeline.Setting(root, use_device(args.device), download=args.download)
        metrics = pipeline.evaluate_again(run, setting)
    experiment.write_results(folder)
    figures = metrics.keys() - {"provenance"}
    changed = [key for key in metrics if key in figures and metrics[key] != before[key]]
    print(results.summary(metrics, config.quantile))
    print(f"  changed   {', '.join(changed) or 'nothing: the numbers are those of the run'}")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
