"""The folder of a run: its files, log, checkpoints, lock, facts and predictions.

Imports `measuring` and below. Start with folder.py.
"""
