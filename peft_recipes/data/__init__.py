"""The data: sources, the meaning of columns, preference pairs, images, packing, and what is prepared for a trainer.

Imports `distributed` and below. Start with sources.py (where rows come from) and columns.py (how a ShareGPT, Alpaca or
classification row is read).
"""
