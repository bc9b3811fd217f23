"""Train PEFT adapters and full fine-tuning under the same conditions, and report the difference with evidence.

    from peft_recipes import load_recipe, compare
    comparison = compare(load_recipe("mnist-shift", embedded=True), arms=["full", "lora"], seeds=[0, 1, 2])
    print(comparison.verdict("lora"))

The names below are imported on first use, so `import peft_recipes` itself is fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "AdapterSet": "adapters.adapter_set",
    "Arm": "recipe.arm",
    "Comparison": "comparison.comparison",
    "Dataset": "recipe.dataset",
    "Pretraining": "recipe.dataset",
    "Recipe": "recipe.recipe",
    "RecipeError": "errors",
    "Run": "runs.folder",
    "base_folder": "adapters.base_folder",
    "compare": "comparison.compare",
    "extract": "search.extraction",
    "load_recipe": "catalog.recipes",
    "main": "cli.script",
    "plan": "planning.plan",
    "publish": "publishing.push",
    "publish_all": "publishing.push",
    "read_comparison": "comparison.comparison",
    "reproduce": "publishing.reproduce",
    "scan": "search.scan",
    "spectrum": "search.spectra",
    "targets": "models.architectures",
    "train": "training.run",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'peft_recipes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peft_recipes.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
