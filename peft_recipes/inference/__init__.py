"""Use saved adapters: generate, chat, predict, and a local web page, each with the base for comparison.

Imports `adapters` and below. Start with variants.py, which has the models; generate.py and predict.py run them.
"""
