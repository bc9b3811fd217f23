"""Runs of several ranks under Accelerate: collectives, launch configurations, batch splitting, full state dicts.

Imports `models` and below. Start with processes.py.
"""
