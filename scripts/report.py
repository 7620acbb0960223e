"""Write an experiment's report: one HTML page that opens from disk, with no server.

Pictures of the images that a run errs on need its model.pt, which git does not keep, and the images
under --data-root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly.cli import Parser, add_place_flags, experiment_folder
from ganomaly.errors import UserError, guard, leaving_at_once


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--experiment", default="local", metavar="NAME", help="folder [local]")
    parser.add_argument("--output", type=Path, metavar="FILE", help="[report.html in the folder]")
    add_place_flags(parser)
    args = parser.parse_args(argv)
    folder = experiment_folder(args, args.experiment)
    if not [*folder.glob("*/seed*/metrics.json"), *folder.glob("*/*/seed*/metrics.json")]:
        raise UserError(f"{folder}: no finished run there to report on")
    with leaving_at_once():
        from ganomaly.device import use_device
        from ganomaly.files import check_output
        from ganomaly.runs import pipeline

    output = args.output or folder / "report.html"
    check_output(output)
    pipeline.write_report(folder, output, args.data_root, use_device(args.device))
    print(f"written {output}")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
