"""One run, stage by stage: resolve the recipe, load, apply the arm, fit, evaluate, save, verify.

Imports `planning`, `cards` and below. Start with run.py, which calls the stages in order; resolve.py runs before any
weight is loaded, and interruption.py handles Ctrl-C and SIGTERM.
"""
