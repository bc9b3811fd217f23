"""What a recipe will train on, before it does: examples as the model sees them, lengths, classes, what is left out.

No weights are loaded: the tokenizer and the configuration are enough. Imports `tasks` and below. Start with summary.py;
examples.py decodes single examples.
"""
