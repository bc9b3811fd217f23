"""Changes to a recipe: `--embedded` and `--set KEY=VALUE`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft_recipes.arms.methods import METHODS
from peft_recipes.arms.selection import choose_arms
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.arm import ARM_KEYS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import from_yaml, has_comment


def changed(recipe: Recipe, embedded: bool = False, changes: Iterable[str] = ()) -> Recipe:
    """Return the recipe with its embedded stand-ins, if wanted, and then the "KEY=VALUE" changes applied."""
    if embedded and not recipe.embedded:
        raise RecipeError(f"Recipe '{recipe.name}' has no embedded stand-ins; run it without --embedded.")
    if embedded:
        recipe = recipe.with_changes(recipe.embedded)
    changes = list(changes)
    return apply_changes(recipe, changes) if changes else recipe


def apply_changes(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """Apply "KEY=VALUE" changes with dotted keys (`arms.lora.peft.r=32`); values are parsed as YAML.

    A key may name an arm of the methods table that the recipe lacks: `arms.dora.peft.r=8` adds it. Raises RecipeError
    with every change that can't be applied.
    """
    changes = list(changes)
    named = [change.split(".")[1] for change in changes if change.startswith("arms.") and change.count(".") > 1]
    if added := [name for name in dict.fromkeys(named) if name in METHODS and name not in recipe.arms]:
        others = [change for change in changes if change.split(".")[:2] not in [["arms", name] for name in added]]
        # The other changes come first: one of them may set the model that the new arms are made for.
        recipe = choose_arms(apply_changes(recipe, others), added).recipe
        changes = [change for change in changes if change not in others]
    plain, problems = recipe.to_dict(), []
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {change}: expected KEY=VALUE, as in --set training.max_steps=50.")
            continue
        try:
            _set(plain, key.strip().split("."), _parse(value))
        except RecipeError as error:
            problems += [f"--set {change}: {problem}" for problem in error.problems]
    if problems:
        raise RecipeError(*problems)
    return Recipe.from_dict(plain)


def with_variant(recipe: Recipe, of: str, name: str, changes: Iterable[str]) -> Recipe:
    """Return the recipe with one arm more: a copy of its arm `of` with "KEY=VALUE" changes.

    Keys are relative to the arm (`peft.r=32`), or begin with it (`arms.lora.peft.r=32`). Raises RecipeError with every
    change that can't be applied, and with every problem of the new arm.
    """
    plain, problems = recipe.to_dict(), []
    plain["arms"][name] = copy.deepcopy(plain["arms"][of])
    for change in changes:
        key, equals, value = change.partition("=")
        key = key.strip().removeprefix(f"arms.{of}.")
        try:
            if not equals or not key:
                raise RecipeError("expected KEY=VALUE, as in --set peft.r=32 or --set learning_rate=1e-3.")
            if reason := _not_of_an_arm(recipe, key, of):
                raise RecipeError(reason)
            _set(plain, ["arms", name, *key.split(".")], _parse(value))
        except RecipeError as error:
            problems += [f"--set {change}: {problem}" for problem in error.problems]
    try:
        made = Recipe.from_dict(plain)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return made


def _not_of_an_arm(recipe: Recipe, key: str, arm: str) -> str:
    """Why a key is no option of an arm, or ""."""
    first, *rest = key.split(".")
    if first == "arms":
        return f"it names another arm; here '{arm}' is changed: --set {'.'.join(rest[1:]) or 'learning_rate'}=..."
    if first not in ARM_KEYS and first in recipe.to_dict():
        return (
            f"'{first}' is the same for all arms of a comparison; an added arm differs in its own options alone: "
            f"{', '.join(ARM_KEYS)}."
        )
    return ""


def _set(plain: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a nested value in place. Raises RecipeError for a key on the way that is unknown or not a mapping."""
    parent: Any = plain
    for depth, key in enumerate(keys[:-1]):
        where = ".".join(keys[:depth]) or "the recipe"
        if isinstance(parent, list):
            parent = parent[_position(key, parent, where)]
            continue
        # A null becomes a mapping; so does any option below `training`, which is checked later.
        if parent.get(key) is None and (key in parent or depth > 1 or (keys[0] == "training" and depth == 1)):
            parent[key] = {}
        if key not in parent:
            raise RecipeError(unknown("arm" if keys[:depth] == ["arms"] else "key", key, parent, where))
        parent = parent[key]
        if not isinstance(parent, (dict, list)):
            raise RecipeError(f"'{'.'.join(keys[: depth + 1])}' holds {parent!r}, nothing inside it.")
    if keys[:-1] == ["arms"] and keys[-1] not in parent:
        raise RecipeError(unknown("arm", keys[-1], parent))
    if isinstance(parent, list):
        parent[_position(keys[-1], parent, ".".join(keys[:-1]))] = value
    else:
        parent[keys[-1]] = value


def _position(key: str, parent: list[Any], where: str) -> int:
    """The position in a list that a key such as the 0 of `datasets.0.weight` names. Raises RecipeError."""
    if not key.isdecimal() or int(key) >= len(parent):
        raise RecipeError(unknown("position", key, map(str, range(len(parent))), where))
    return int(key)


def _parse(text: str) -> Any:
    """The value of a change: YAML without comments, so that " #" is part of a text.

    Raises RecipeError for a comment behind a list or mapping, and for a key that is given twice.
    """
    import yaml

    if text.lstrip().startswith(("|", ">", "&")):
        return text.strip()  # what YAML would take for a block or an anchor
    try:
        if not has_comment(text):
            return from_yaml(text)
    except yaml.constructor.ConstructorError as error:
        raise RecipeError(f"{' '.join(str(error).split())}.") from error
    except yaml.YAMLError:
        return text
    if text.lstrip().startswith(("[", "{")):
        raise RecipeError("a # behind a space begins a comment in a list or mapping. Put the text in quotes.")
    return text.strip()
