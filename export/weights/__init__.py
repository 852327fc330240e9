"""The weights: where each tensor comes from, where it is stored, and the stream that writes it."""
