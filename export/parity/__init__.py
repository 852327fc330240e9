"""Proof: the PyTorch reference, and the comparison of an artifact with it, stage by stage."""
