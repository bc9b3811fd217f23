"""Arms: how a base model is made trainable, the table of PEFT methods, and which arms a comparison has.

Imports `guards` and below. Start with apply.py; default ranks and learning rates are in methods.py.
"""
