"""The command line: words in, library calls, words out. No logic of its own.

A file a group of commands; each registers its own with `app` when it is imported here.
"""

from __future__ import annotations

import importlib

from peft_recipes.cli.common import app

# In the order of `peft-recipes --help`.
for _group in ("recipes", "methods", "search", "adapters", "inference", "publishing"):
    importlib.import_module(f"peft_recipes.cli.{_group}")

__all__ = ["app"]
