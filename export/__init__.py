"""Checkpoint -> artifact. A tool of the checkout: `python -m export --help`."""
