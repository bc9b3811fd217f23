"""Several processes of one run, started by Accelerate: ranks, launch configurations, batch splitting, gathered weights.

Imports `models` and below. Start with processes.py.
"""
