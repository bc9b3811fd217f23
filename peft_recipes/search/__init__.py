"""Which learning rate and which rank: scans of short runs, and the spectrum of a full fine-tune.

Imports `adapters` and below. Start with scan.py.
"""
