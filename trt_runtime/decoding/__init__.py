"""The decoding loop: rows, policies, cache plans, and what a backend is. NumPy only."""
