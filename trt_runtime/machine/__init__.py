"""The machine: its devices, what fits on them and how fast it runs, and what is missing."""
