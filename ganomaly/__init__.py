"""GANomaly (Akcay et al. 2018, arXiv 1805.06725) in plain PyTorch.

from ganomaly import load
detector = load("experiments/local/bottle/seed42/model.pt")
scores, p_values, defective = detector(["a.png", "b.jpg"])
"""

__version__ = "1.0.0"


def load(path, device: str = "auto"):
    """The trained detector of a model.pt, or of a run's folder; see ganomaly.detector.Detector.

    device: auto, cpu, cuda or cuda:N. UserError where the file is none of ours.
    """
    from ganomaly.detector import load_detector  # late: importing ganomaly imports no torch
    from ganomaly.device import use_device

    return load_detector(path, use_device(device))
