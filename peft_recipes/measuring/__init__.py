"""Measurements of a run: step times, peak memory, latency.

Imports `arms` and below. Start with steps.py.
"""
