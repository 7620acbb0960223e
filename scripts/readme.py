"""Write the table of results in README.md, between its markers, from the committed runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly import cli
from ganomaly.config import EXPERIMENTS, ROOT
from ganomaly.errors import guard
from ganomaly.files import write_atomic
from ganomaly.runs import published
from ganomaly.runs.experiment import read_runs
from ganomaly.runs.results import markdown_table, spread

README = ROOT / "README.md"
START, END = "<!-- scripts/readme.py writes this table -->\n\n", "\n<!-- end of the table -->"
OURS = [  # header, recipe, key of its runs' metrics.json
    ("`paper`", "paper", "auroc"),
    ("its PCA-40", "paper", "auroc_pca"),
    ("`calibrated`", "calibrated", "auroc"),
    ("its PCA-40", "calibrated", "auroc_pca"),
    ("its nearest image", "calibrated", "auroc_nearest"),
]
OTHERS = {
    "GANomaly, anomalib": published.MVTEC["AUROC, anomalib README"],
    "GANomaly, DRAEM's paper": published.MVTEC["AUROC, DRAEM, Table 1"],
    **published.FROM_SCRATCH,
}


def main(argv=None) -> None:
    cli.Parser(__doc__).parse_args(argv)
    write_atomic(README, updated(README.read_text(encoding="utf-8")))


def updated(text: str) -> str:
    before, _, rest = text.partition(START)
    return f"{before}{START}{table()}{END}{rest.partition(END)[2]}"


def table() -> str:
    """A row a set: our AUROC, mean ± deviation over seeds; means of controls; others' figures."""
    runs = {name: read_runs(EXPERIMENTS / name) for name in ("paper", "calibrated")}
    lines = []
    for category in sorted({row["category"] for rows in runs.values() for row in rows}):
        cells = [category]
        for _, name, column in OURS:
            rows = [row for row in runs[name] if row["category"] == category]
            text = spread([row[column] for row in rows])
            cells.append(text if column == "auroc" else text.split(" ± ")[0])
        others = [[other[category]] if category in other else [] for other in OTHERS.values()]
        lines.append([*cells, *map(spread, others)])
    return markdown_table(["set", *(header for header, *_ in OURS), *OTHERS], lines)


if __name__ == "__main__":
    sys.exit(guard(main))
