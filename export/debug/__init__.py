"""Debugging engines with Polygraphy, the tool that TensorRT's users know: a kit of files for its command
line, and runners for its Comparator."""
