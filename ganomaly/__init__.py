"""GANomaly (Akcay et al. 2018, arXiv 1805.06725) in plain PyTorch."""
