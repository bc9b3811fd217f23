"""Arms: applying one to a base model, the table of PEFT methods, and choosing the arms of a comparison by name.

Imports `guards` and below. Start with apply.py. Default ranks and learning rates are in methods.py.
"""
