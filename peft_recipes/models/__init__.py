"""The base model: configuration, weights and tokenizer, module names by architecture, quantisation, access to the Hub.

Imports `kernels`, `hardware`, `embedded`, `recipe`. Start with bases.py; a new architecture is a row in
architecture_table.py.
"""
