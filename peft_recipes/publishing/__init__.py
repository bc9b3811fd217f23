"""From a run to the Hub and back: push, reproduce.

Imports `comparison` and below. Start with push.py: what is uploaded.
"""
