"""The command line: options in, calls of the packages below, printed output. No logic of its own.

The highest package: nothing imports it but `peft_recipes.main`. Start with app.py; common.py handles errors and Ctrl-C
for all commands, output/ prints.
"""
