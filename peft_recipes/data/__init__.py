"""Datasets of a recipe: sources, column formats, preference pairs, images, packing, and the prepared splits.

Imports `distributed` and below. Start with sources.py (where rows come from) and columns.py (how a ShareGPT, Alpaca or
classification row is read).
"""
