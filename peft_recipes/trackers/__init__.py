"""Experiment trackers (`training.report_to`): one tracker run for each run of a recipe.

choice.py reads the option and checks it before anything starts, session.py holds the open trackers of one run, and each
of tensorboard.py, mlflow.py, wandb.py and trackio.py speaks to one tracker through its own client.
"""
