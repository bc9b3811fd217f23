"""A recipe drafted from a model and a dataset: task, columns, length, arms and batch, each with its reason.

Looks at the model's configuration and the first rows, and loads no weights. Imports `planning` and below. Start with
draft.py; base.py and columns.py look at the model and the data, finding.py and choices.py decide on columns and task,
arms.py on arms and batch; module.py writes the recipe.
"""
