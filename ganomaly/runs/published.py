"""Published GANomaly figures that results.md puts beside ours, as fractions; sources in the names.

No source states its protocol whole; all that is known of them differs from ours.
"""

from __future__ import annotations

ORDER = (
    "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush",
    "transistor", "zipper", "carpet", "grid", "leather", "tile", "wood",
)  # fmt: skip


def row(names, *percent: float) -> dict[str, float]:
    return dict(zip(names, (round(value / 100, 4) for value in percent), strict=True))


MVTEC = {
    "AUROC, anomalib README": row(
        ("Mean", *ORDER),
        42.1, 25.1, 45.7, 68.2, 53.7, 27.0, 47.2, 23.1, 37.2, 44.0, 43.4,
        20.3, 40.4, 41.3, 40.8, 74.4,
    ),
    "AUROC, arXiv 2108.12159": row(
        ("Mean", *ORDER),
        76.2, 89.2, 75.7, 73.2, 78.5, 70.0, 74.3, 74.6, 65.3, 79.2, 74.5,
        69.9, 70.8, 84.2, 79.4, 83.4,
    ),
    "AUROC, DRAEM, Table 1": row(
        ("Mean", *ORDER),
        78.2, 79.4, 71.1, 72.1, 87.4, 69.4, 67.1, 100, 70.0, 80.8, 74.4,
        82.1, 74.3, 80.8, 72.0, 92.0,
    ),
    # Over the test set; in all 15 categories it is what calling every image defective gives
    "F1-max, anomalib README": row(
        ("Mean", *ORDER),
        83.4, 86.3, 76.0, 90.5, 77.7, 89.4, 91.6, 85.3, 83.3, 57.1, 88.1,
        86.4, 84.4, 85.2, 83.6, 86.3,
    ),
}  # fmt: skip
MNIST = {
    "AUROC, GANomaly paper, best epoch": row(
        ("Mean", *"0123456789"),
        75.7, 85.0, 33.0, 92.0, 77.1, 77.0, 80.0, 88.0, 78.0, 89.0, 58.0,
    ),
}  # fmt: skip
CIFAR10 = {
    "AUROC, GANomaly paper, best epoch": row(
        ("Mean", "plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        60.5, 62.5, 62.9, 50.5, 57.7, 59.3, 63.3, 65.3, 60.1, 62.2, 61.4,
    ),
}  # fmt: skip

# dataset -> {column's name: {category or Mean: figure}}; a folder may hold MVTec's categories
PUBLISHED = {"mvtec": MVTEC, "folder": MVTEC, "mnist": MNIST, "cifar10": CIFAR10}
