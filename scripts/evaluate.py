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
        from ganomaly import data, experiment
        from ganomaly.files import locked

    run = experiment.Run(folder, data.category_name(asked, args.data_root), asked)
    with locked(run.folder):  # before it is read: another process may be training it anew
        told = again(run, given, args)
    experiment.write_results(folder)
    print(told)
    return 0


def again(run, given: dict, args) -> str:
    """Score the run; returns what is to be said of it."""
    from ganomaly import data, evaluation, experiment, pipeline, results
    from ganomaly.detector import load_detector
    from ganomaly.device import use_device, use_threads

    if not run.finished:
        raise UserError(
            f"{run.folder}: no finished run there, with model.pt (which git does not keep) and "
            "metrics.json; train it into this experiment first"
        )
    before = experiment.read_metrics(run.path("metrics.json"))
    detector = load_detector(run.path("model.pt"), use_device(args.device))
    config = detector.config
    for name, value in given.items():
        if value not in (None, "auto") and value != getattr(config, name):
            raise UserError(f"{name}: {run.folder} has {getattr(config, name)}, not {value}")
    use_threads(config.threads)
    pipeline.check_train_files(before, config, args.data_root)
    category = data.load(config, args.data_root, args.download)
    training = {key: before[key] for key in (*results.TIMES, "provenance")}
    metrics = evaluation.assess(run, detector, category, training)
    changed = [key for key in metrics if metrics[key] != before[key]]
    if {"n_test_good", "n_test_defective"} & set(changed):  # its looks were at other images
        run.path("curve.csv").unlink(missing_ok=True)
    told = ", ".join(changed) or "nothing: the numbers are those of the run"
    return f"{results.summary(metrics, config.quantile)}\n  changed   {told}"


if __name__ == "__main__":
    sys.exit(guard(main))
