"""Adapters measured honestly beside full fine-tuning.

    from peft_recipes import load_recipe, compare
    comparison = compare(load_recipe("mnist-shift", embedded=True), arms=["full", "lora"], seeds=[0, 1, 2])
    print(comparison.verdict("lora"))

The names below are imported when they are first used: `import peft_recipes` itself brings in nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "AdapterSet": "adapters.adapter_set",
    "Arm": "recipe",
    "Comparison": "comparison",
    "Dataset": "recipe",
    "Pretraining": "recipe",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "Run": "runs",
    "base_folder": "adapters.loading",
    "compare": "comparison",
    "extract": "search.extraction",
    "load_recipe": "catalog",
    "main": "script",
    "plan": "planning",
    "publish": "publishing",
    "publish_all": "publishing",
    "read_comparison": "comparison",
    "reproduce": "publishing.reproducing",
    "scan": "search.scanning",
    "spectrum": "search.spectra",
    "targets": "architectures",
    "train": "training",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'peft_recipes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peft_recipes.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
