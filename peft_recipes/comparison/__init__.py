"""Comparisons: many runs of one recipe, each trained in a process of its own, collected into one table.

Imports `adapters`, `training` and below; imported by `publishing` and `cli`. Start with compare.py. compare.py and
pool.py run in the caller's process; worker.py is the process of one run.
"""
