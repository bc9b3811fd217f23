"""Stand-in models and datasets that need no Hub, built on first use from files in Python packages.

Imports `errors` alone. Used by `models` (base models) and `data` (datasets). Start with the two tables in stand_ins.py.
"""
