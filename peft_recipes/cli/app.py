"""The `peft-recipes` command: importing a module of commands registers them with `app`."""

from __future__ import annotations

import importlib

from peft_recipes.cli.common import app

# In the order of `peft-recipes --help`.
_GROUPS = (
    "data", "recipes", "changing", "search", "adapters", "exporting", "inference", "serving", "publishing", "skill",
)  # fmt: skip
for _group in _GROUPS:
    importlib.import_module(f"peft_recipes.cli.{_group}")

__all__ = ["app"]
