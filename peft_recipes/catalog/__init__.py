"""Loading recipes by name or path, with `--embedded` and `--set` applied.

Imports `arms` and below. Start with recipes.py; `--set` is in changes.py.
"""
