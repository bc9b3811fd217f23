"""From the runs of a comparison to its results: paired bootstrap intervals, verdicts, ranks.

Imports `runs` and `recipe`. Start with bootstrap.py.
"""
