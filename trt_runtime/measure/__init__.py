"""Measurements of an artifact: speed, recorded cases, evaluation tasks, tuning."""
