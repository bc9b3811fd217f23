"""Stand-in models and datasets that need no Hub, made on first use from what Python packages carry.

Imports `errors` alone. Used by `models` (base models) and `data` (datasets). Start with stand_ins.py: the two tables of
what there is.
"""
