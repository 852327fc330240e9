"""A quantised export: calibrate, write, judge before it is kept."""
