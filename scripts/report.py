"""Write an experiment's report: one HTML page that opens from disk, with no server.

Pictures of the images that a run errs on need its model.pt, which git does not keep, and the images
under --data-root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly import cli
from ganomaly.device import use_device
from ganomaly.errors import UserError, guard
from ganomaly.files import check_output, write_output
from ganomaly.runs.report import report_page


def main(argv=None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="[report.html in the folder]")
    cli.add_place_flags(parser)
    args = parser.parse_args(argv)
    folder = cli.experiment_folder(args)
    if not list(folder.glob("*/seed*/metrics.json")):
        raise UserError(f"{folder}: no finished run there; name its --experiment")
    output = args.output or folder / "report.html"
    check_output(output)
    write_output(output, report_page(folder, args.data_root, use_device(args.device)))
    print(f"written {output}")


if __name__ == "__main__":
    sys.exit(guard(main))
