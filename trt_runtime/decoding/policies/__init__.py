"""Policies: which masked positions to commit, from the statistics of a forward."""
