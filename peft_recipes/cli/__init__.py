"""The command line: parse options, call the packages below, print the result. It holds no logic of its own.

Imports everything below and is imported by nothing; `peft_recipes.main` is script.py's. Start with app.py; common.py
holds the shared options and the error handling, output/ the console output.
"""
