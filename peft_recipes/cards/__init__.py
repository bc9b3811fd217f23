"""Model cards: the README.md of a run, with its evidence and the code that loads it.

Imports `reporting` and below. Start with content.py.
"""
