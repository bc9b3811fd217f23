"""From the runs of a comparison to its results: paired bootstrap intervals, verdicts, ranks.

Imports `runs`, `recipe` and below; used by `reporting` and above. Start with results.py, then bootstrap.py.
"""
