"""The machine: its devices, what fits and how fast, and what is missing."""
