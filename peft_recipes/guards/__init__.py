"""The checks of a run: cheap, on by default, each with what happened, where, and what to do.

Imports `data` and below. checks.py has the checks, runner.py calls them by name; their names and meanings are the table
`GUARDS` in recipe/options.py.
"""
