"""Saved adapters, ours or anyone's: read, check, merge, combine, serve many on one base.

Imports `training` and below. Start with open.py.
"""
