"""Recipes by name or path, with `--embedded` and `--set` applied.

Imports `arms` and below. Start with recipes.py.
"""
