"""The recipe as pure data: `Recipe`, `Arm`, `Dataset`, their validation, and YAML.

The lowest package: it imports only `errors`, and every other package may import it. Start with recipe.py; the tables of
valid tasks, metrics, guards and training options are in options.py.
"""
