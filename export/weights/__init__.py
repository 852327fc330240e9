"""The weights: where each tensor comes from and lies, and the stream that puts it there."""
