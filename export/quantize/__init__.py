"""A quantised export: calibrate, write, and measure the quality before the artifact is kept."""
