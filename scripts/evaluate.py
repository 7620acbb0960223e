"""Score a finished run again from its model.pt and rewrite its numbers.

The run is found by --experiment, --category and --seed. It keeps its own config; other config
flags are refused if they differ from it. If the code has changed since, the model is calibrated
again. With another --score that score's figures are shown, and nothing is written.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly import cli, data
from ganomaly.config import load_config, resolve
from ganomaly.device import use_device
from ganomaly.errors import UserError, guard
from ganomaly.files import locked
from ganomaly.runs.experiment import write_results
from ganomaly.runs.pipeline import Setting, evaluate_again
from ganomaly.runs.results import summary
from ganomaly.runs.run import Run, read_metrics


def main(argv=None) -> None:
    parser = cli.Parser(__doc__)
    cli.add_place_flags(parser)
    parser.add_config_flags()
    args = parser.parse_args(argv)
    given = cli.given_values(args)
    score = given.pop("score", None)
    asked = resolve(given)
    folder = cli.experiment_folder(args)

    run = Run(folder, data.category_name(asked, args.data_root), asked)
    if not run.finished:
        raise UserError(
            f"{run.folder}: no finished run there, with model.pt (which git does not keep) and "
            "metrics.json; train it, or name its --experiment"
        )
    with locked(run.folder):  # another process may be training it anew
        run.config = config = load_config(run.folder / "config.json")
        for name, value in given.items():
            if value not in (None, "auto", getattr(config, name)):
                raise UserError(f"{name}: {run.folder} has {getattr(config, name)}, not {value}")
        before = read_metrics(run.folder)
        setting = Setting(args.data_root, use_device(args.device), download=args.download)
        metrics = evaluate_again(run, setting, score)
    print(summary(metrics, config.quantile))
    if metrics["score"] != config.score:
        print(f"  written   nothing, as the score of this run is {config.score}")
        return
    write_results(folder)
    changed = [key for key in metrics if key != "provenance" and metrics[key] != before.get(key)]
    print(f"  changed   {', '.join(changed) or 'nothing: the numbers are those of the run'}")


if __name__ == "__main__":
    sys.exit(guard(main))
