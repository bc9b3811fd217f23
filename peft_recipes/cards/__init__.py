"""Model cards: the README.md of a run, with its figures and the code that loads it.

Imports `reporting` and below; used by `training`, `comparison` and `publishing`. Start with content.py.
"""
