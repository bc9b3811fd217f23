"""Saved adapters, trained here or elsewhere: read, check, merge, combine, and use many on one base.

Imports `training` and below. Start with open.py: `open_adapter` reads an adapter and finds its task and its base.
check.py has the checks of a saved adapter; those of a training run are in `guards`, those of a recipe in `recipe`.
"""
