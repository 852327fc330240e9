"""Debugging engines with Polygraphy, NVIDIA's tool for TensorRT: a kit of files for its command line, and
runners for its Comparator."""
