"""Published figures to stand beside ours; sources in the names.

results.md shows those of GANomaly. No source states its protocol whole. What they do state differs
from our protocol.
"""

from ganomaly import data


def row(percent: str, categories=data.MVTEC) -> dict[str, float]:
    """Category -> fraction. The first figure is the mean; the others follow the categories."""
    figures = (round(float(value) / 100, 4) for value in percent.split())
    return dict(zip(("Mean", *categories), figures, strict=True))


MVTEC = {
    "AUROC, anomalib README": row(
        "42.1 25.1 45.7 68.2 20.3 40.4 53.7 41.3 27 47.2 23.1 40.8 37.2 44 74.4 43.4"
    ),
    "AUROC, arXiv 2108.12159": row(
        "76.2 89.2 75.7 73.2 69.9 70.8 78.5 84.2 70 74.3 74.6 79.4 65.3 79.2 83.4 74.5"
    ),
    "AUROC, DRAEM, Table 1": row(
        "78.2 79.4 71.1 72.1 82.1 74.3 87.4 80.8 69.4 67.1 100 72 70 80.8 92 74.4"
    ),
    # Over the test set; in all 15 categories it is what calling every image defective gives
    "F1-max, anomalib README": row(
        "83.4 86.3 76 90.5 86.4 84.4 77.7 85.2 89.4 91.6 85.3 83.6 83.3 57.1 86.3 88.1"
    ),
}
# Other methods that use no pretrained network: DRAEM (arXiv 2108.07610), RIAD (Zavrtanik et al.,
# Pattern Recognition 2021); README's table shows them
FROM_SCRATCH = {
    "DRAEM": row("98 99.2 91.8 98.5 97 99.9 100 100 98.7 98.9 93.9 99.6 100 93.1 99.1 100"),
    "RIAD": row("91.7 99.9 81.9 88.4 84.2 99.6 83.3 100 88.5 83.8 84.5 98.7 100 90.9 93 98.1"),
}
PAPER = "AUROC, GANomaly paper, best epoch"
MNIST = {PAPER: row("75.7 85 33 92 77.1 77 80 88 78 89 58", data.TEN)}
CIFAR10 = {PAPER: row("60.5 62.5 62.9 50.5 57.7 59.3 63.3 65.3 60.1 62.2 61.4", data.CIFAR10)}

# dataset -> {column's name: {category or Mean: figure}}; a folder may hold MVTec's categories
PUBLISHED = {"mvtec": MVTEC, "folder": MVTEC, "mnist": MNIST, "cifar10": CIFAR10}
