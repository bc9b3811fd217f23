"""Scoring of what a model does: its generated answers, and values for the intervals of metrics that are no mean.

Imports `runs` and below. Start with answers.py; benchmarks.py runs lm_eval.
"""
