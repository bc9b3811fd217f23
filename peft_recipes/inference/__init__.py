"""Saved adapters in use: generate, chat, predict, and a local web page; side by side with their base.

Imports `adapters` and below. Start with variants.py.
"""
