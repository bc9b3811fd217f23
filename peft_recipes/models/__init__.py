"""The base model: configuration, weights, tokenizer; the table of architectures; quantisation; access to the Hub.

Imports `kernels`, `hardware`, `embedded`, `recipe`. Start with bases.py; a new architecture is a row in
architecture_table.py.
"""
