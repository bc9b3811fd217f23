"""Guards: cheap checks of a run, on by default; each message says what happened, where, and what to do.

Imports `data` and below. checks.py has the checks, and runner.py calls them by name. The table `GUARDS` in
recipe/options.py has their names and meanings.
"""
