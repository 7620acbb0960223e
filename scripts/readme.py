"""Write the table of results in README.md, between its markers, from the committed results.csv."""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ganomaly import cli
from ganomaly.config import EXPERIMENTS, ROOT
from ganomaly.errors import guard
from ganomaly.files import write_atomic
from ganomaly.runs.published import PUBLISHED
from ganomaly.runs.results import markdown_table, spread

README = ROOT / "README.md"
START, END = "<!-- scripts/readme.py writes this table -->\n\n", "\n<!-- end of the table -->"
RECIPES = ("paper", "calibrated")
OTHERS = {
    "anomalib's README": "AUROC, anomalib README",
    "DRAEM, Table 1": "AUROC, DRAEM, Table 1",
    "arXiv 2108.12159": "AUROC, arXiv 2108.12159",
}


def main(argv=None) -> int:
    cli.Parser(__doc__).parse_args(argv)
    write_atomic(README, updated(README.read_text(encoding="utf-8")))
    return 0


def updated(text: str) -> str:
    """README's text with today's table."""
    before, _, rest = text.partition(START)
    return f"{before}{START}{table()}{END}{rest.partition(END)[2]}"


def table() -> str:
    """A row a set: mean ± deviation over seeds of each recipe and of its PCA; others' figures."""
    rows = {}
    for name in RECIPES:
        with open(EXPERIMENTS / name / "results.csv", encoding="utf-8") as file:
            rows[name] = [row for row in csv.DictReader(file) if row["cpu"]]  # not the means
    lines = []
    for category in sorted({row["category"] for row in rows[RECIPES[0]]}):
        cells = [category]
        for name in RECIPES:
            for column in ("auroc", "auroc_pca"):
                figures = [float(r[column]) for r in rows[name] if r["category"] == category]
                cells.append(spread(figures))
        for title in OTHERS.values():
            figure = PUBLISHED["mvtec"][title].get(category)
            cells.append("" if figure is None else f"{figure:.3f}")
        lines.append(cells)
    header = ["set", *(x for name in RECIPES for x in (f"`{name}`", "its PCA-40")), *OTHERS]
    return markdown_table(header, lines)


if __name__ == "__main__":
    sys.exit(guard(main))
