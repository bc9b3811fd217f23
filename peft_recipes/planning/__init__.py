"""Parameters, memory and time of every arm before a weight is loaded.

Imports `tasks` and below. Start with plan.py.
"""
