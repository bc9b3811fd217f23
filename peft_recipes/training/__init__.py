"""One run, stage by stage: resolve the recipe, load, apply the arm, fit, evaluate, save, verify.

Imports `planning`, `cards` and below. Start with run.py; Ctrl-C and SIGTERM are handled in interruption.py.
"""
