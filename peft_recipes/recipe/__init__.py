"""A recipe as pure data: `Recipe`, `Arm` and `Dataset`, their validation, and reading and writing them as YAML.

The lowest package: it imports only `errors`, and every other package may import it. Start with recipe.py. The tables of
valid tasks, metrics, guards and training options are in options.py.
"""
