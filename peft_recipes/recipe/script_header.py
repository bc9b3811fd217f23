"""The header of a recipe module that says what it needs (PEP 723), so that `uv run recipe.py --arm lora` installs it.

Shipped recipes carry it and `peft-recipes new` writes it; a test compares both with pyproject.toml.
"""

from __future__ import annotations

import importlib.metadata

from peft_recipes.recipe.recipe import Recipe

PACKAGE = "peft_recipes"


def extras(recipe: Recipe) -> list[str]:
    """The optional dependencies that a recipe's own settings need, in alphabetical order."""
    optimizers = [recipe.training.get("optim"), *(arm.optim for arm in recipe.arms.values())]
    needed = {
        "benchmarks": bool(recipe.benchmarks),
        "embedded": bool(recipe.embedded) or recipe.uses_stand_ins,
        "judge": bool(recipe.judge and recipe.judge.base_url),
        "quantised": any(arm.quantise for arm in recipe.arms.values())
        or any(part in str(name) for name in optimizers for part in ("8bit", "bnb", "paged")),
    }
    return [name for name, needs in needed.items() if needs]


def script_header(optional: list[str]) -> str:
    """Return the header: the installed version's range of Python, and this version of the package or a later one."""
    about = importlib.metadata.metadata(PACKAGE)
    version = about["Version"].partition("+")[0]
    chosen = f"[{','.join(optional)}]" if optional else ""
    lines = [
        "/// script",
        f'requires-python = "{about["Requires-Python"]}"',
        f'dependencies = ["{PACKAGE}{chosen}>={version}"]',
        "///",
    ]
    return "".join(f"# {line}\n" for line in lines)
