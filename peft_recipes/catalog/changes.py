"""Changes laid over a recipe: `--embedded` and `--set KEY=VALUE`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft_recipes.arms.methods import METHODS
from peft_recipes.arms.selection import choose_arms
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import from_yaml


def changed(recipe: Recipe, embedded: bool = False, changes: Iterable[str] = ()) -> Recipe:
    """The recipe with its stand-ins laid over it, if asked for, and then the "KEY=VALUE" changes."""
    if embedded and not recipe.embedded:
        raise RecipeError(f"Recipe '{recipe.name}' has no embedded stand-ins; run it without --embedded.")
    if embedded:
        recipe = recipe.with_changes(recipe.embedded)
    listed = list(changes)
    return apply_changes(recipe, listed) if listed else recipe


def apply_changes(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """A recipe with "KEY=VALUE" changes, the keys dotted (`arms.lora.peft.r=32`), the values read as YAML.

    A method of the table is an arm like any other: `arms.dora.peft.r=8` on a recipe without it. Raises RecipeError with
    every change that can't be made.
    """
    changes = list(changes)
    named = [change.split(".")[1] for change in changes if change.startswith("arms.") and change.count(".") > 1]
    if wanted := [name for name in dict.fromkeys(named) if name in METHODS and name not in recipe.arms]:
        ours = [change for change in changes if change.split(".")[:2] not in [["arms", name] for name in wanted]]
        recipe = choose_arms(apply_changes(recipe, ours), wanted).recipe  # made for the base that the others may name
        changes = [change for change in changes if change not in ours]
    plain, problems = recipe.to_dict(), []
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {change}: expected KEY=VALUE, as in --set training.max_steps=50.")
            continue
        try:
            _set(plain, key.strip().split("."), _value(value), change)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return Recipe.from_dict(plain)


def _set(plain: dict[str, Any], keys: list[str], value: Any, change: str) -> None:
    place: Any = plain
    for depth, key in enumerate(keys[:-1]):
        where = ".".join(keys[:depth]) or "the recipe"
        if place.get(key) is None and (key in place or depth > 1):
            place[key] = {}
        if key not in place and keys[0] == "training" and depth == 1:
            place[key] = {}  # a mapping among the options; whether it is one is asked of TrainingArguments
        if key not in place:
            kind = "arm" if keys[:depth] == ["arms"] else "key"
            raise RecipeError(f"--set {change}: " + unknown(kind, key, place, where))
        place = place[key]
        if not isinstance(place, dict):
            raise RecipeError(f"--set {change}: '{'.'.join(keys[: depth + 1])}' holds {place!r}, nothing inside it.")
    if keys[:-1] == ["arms"] and keys[-1] not in place:
        raise RecipeError(f"--set {change}: " + unknown("arm", keys[-1], place))
    place[keys[-1]] = value


def _value(text: str) -> Any:
    import yaml

    # YAML 1.1 reads 1e-3 (no dot) as text; a learning rate is written like that more often than not.
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    try:
        return from_yaml(text)
    except yaml.YAMLError:
        return text
