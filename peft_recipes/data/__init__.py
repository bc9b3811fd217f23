"""Datasets of a recipe: sources, column formats, preference pairs, images, packing, and the prepared splits.

Imports `distributed` and below. Start with sources.py (where rows come from) and formats.py (how a classification,
Alpaca or chat row is read).
"""
