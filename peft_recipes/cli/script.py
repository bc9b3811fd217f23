"""A recipe module as a script: `python recipes/NAME.py --arm lora`, alone or under `accelerate launch`."""

from __future__ import annotations

import sys

from peft_recipes.recipe.recipe import Recipe


def main(recipe: Recipe) -> None:
    """What a recipe module runs when it is started itself: the flags of `peft-recipes train`, for this recipe."""
    from peft_recipes.cli.recipes import train_app

    train_app(recipe, sys.argv[1:])
