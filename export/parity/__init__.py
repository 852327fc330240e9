"""Proof: the PyTorch reference, and an artifact compared with it stage by stage."""
