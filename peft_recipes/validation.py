"""What is wrong with a recipe: every problem at once, one line each, before anything runs."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import TYPE_CHECKING, Any

from peft_recipes.dataset import Dataset
from peft_recipes.errors import unknown
from peft_recipes.guards import GUARDS
from peft_recipes.options import LANGUAGE_TASKS, METRICS, TASKS, training_problems

if TYPE_CHECKING:
    from peft_recipes.recipe import Recipe

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
BATCHES = ("shared-prefix", "padded")

# Written into every file name and repository name, so kept to what all of them take.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*\Z", re.IGNORECASE)
_SAID = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def type_problems(made: Any, where: str = "") -> list[str]:
    """One line for each field of a dataclass whose value is not of its annotated type (int does for float)."""
    hints = typing.get_type_hints(type(made))
    return [
        f"{where}{f.name}: expected {_said(hints[f.name])}, got {getattr(made, f.name)!r}."
        for f in dataclasses.fields(made)
        if not _fits(getattr(made, f.name), hints[f.name])
    ]


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, inside[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in value.items())
    if hint in (int, float):
        number = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, hint)


def _said(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_said(one) for one in inside))
    if origin is list:
        return f"a list of {_said(inside[0])}" if inside[0] is not Any else "a list"
    if origin is dict:
        return "a mapping" + (f" of names to {_said(inside[1])}" if inside[1] is not Any else "")
    return _SAID.get(hint, f"a {getattr(hint, '__name__', hint)}")


def recipe_problems(recipe: Recipe) -> list[str]:
    """Every problem of a recipe; empty when it is sound."""
    wrong_types = type_problems(recipe)
    found = list(wrong_types)
    if isinstance(recipe.dataset, Dataset):
        found += recipe.dataset.problems()
    if isinstance(recipe.arms, dict):
        found += _arm_problems(recipe)
    if isinstance(recipe.training, dict) and isinstance(recipe.task, str):
        found += training_problems(recipe.training, recipe.task)
    if wrong_types:
        return found  # the rest takes the types for granted
    found += _value_problems(recipe)
    if recipe.pretraining is not None:
        found += recipe.pretraining.problems()
    return found + _prompt_problems(recipe) + _also_problems(recipe) + _embedded_problems(recipe)


def _value_problems(recipe: Recipe) -> list[str]:
    found = [f"{key}: expected text, got {getattr(recipe, key)!r}." for key in ("name", "task", "model")
             if not getattr(recipe, key).strip()]  # fmt: skip
    if not _NAME.match(recipe.name):
        found.append(f"name: '{recipe.name}' must be letters, digits, '.', '_' and '-' only: it names a folder.")
    metrics = METRICS.get(recipe.task, ("accuracy", "loss"))
    chosen = {"task": TASKS, "metric": metrics, "batches": BATCHES}
    for key, valid in chosen.items():
        if getattr(recipe, key) not in valid:
            found.append(
                unknown(key, str(getattr(recipe, key)), valid, f"task {recipe.task}" if key == "metric" else "")
            )
    if recipe.attention not in (None, *ATTENTION):
        found.append(unknown("value", recipe.attention, ATTENTION, "attention"))
    for key in ("max_length", "max_row_tokens"):
        if getattr(recipe, key) < 2:
            found.append(f"{key}: expected a whole number of tokens of 2 or more, got {getattr(recipe, key)}.")
    if recipe.margin is not None and recipe.margin <= 0:
        found.append(f"margin: expected a number above 0, got {recipe.margin}.")
    if recipe.checkpoint_seconds < 0:
        found.append(f"checkpoint_seconds: expected 0 or more, got {recipe.checkpoint_seconds}.")
    if recipe.threads is not None and recipe.threads < 1:
        found.append(f"threads: expected a whole number of 1 or more, got {recipe.threads}.")
    return found + [unknown("check", c, GUARDS, "skip_checks") for c in recipe.skip_checks if c not in GUARDS]


def _arm_problems(recipe: Recipe) -> list[str]:
    found = [] if recipe.arms else ["arms: a recipe needs at least one arm."]
    for name, arm in recipe.arms.items():
        if not _NAME.match(str(name)) or name in ("base", "all"):
            found.append(f"arms: '{name}' can't name an arm: letters, digits, '.', '_', '-', not 'base', not 'all'.")
        if not hasattr(arm, "problems"):
            found.append(f"arms.{name}: expected an Arm (method, learning_rate), got {type(arm).__name__}.")
            continue
        found += arm.problems(f"arms.{name}")
        if name == "full" and arm.method != "full":
            found.append("arms.full: the arm of this name is what the others are held against: its method is 'full'.")
        if arm.method == "head" and recipe.task in LANGUAGE_TASKS:
            found.append(f"arms.{name}: 'head' needs a task head; a {recipe.task} model has only its vocabulary.")
    return found


def _prompt_problems(recipe: Recipe) -> list[str]:
    return [
        f"prompts[{i}]: expected a mapping with 'kind' and 'prompt', got {row!r}."
        for i, row in enumerate(recipe.prompts)
        if set(row) != {"kind", "prompt"}
    ]


def _also_problems(recipe: Recipe) -> list[str]:
    keys = [f.name for f in dataclasses.fields(Dataset)]
    found = []
    for name, changes in recipe.evaluate_also.items():
        where = f"evaluate_also.{name}"
        if name in ("train", "validation", "test", "pretrain"):
            found.append(f"evaluate_also: '{name}' is the name of a split of the recipe itself; choose another.")
        strange = [unknown("key", key, keys, where) for key in changes if key not in keys]
        found += strange
        if not strange:
            found += Dataset(**{**vars(recipe.dataset), **changes}).problems(where)
    return found


def _embedded_problems(recipe: Recipe) -> list[str]:
    """Keys that `--embedded` would not find; their values are checked when it is used."""
    names = [f.name for f in dataclasses.fields(recipe)]
    found = [unknown("key", key, names, "embedded") for key in recipe.embedded if key not in names]
    arms = recipe.embedded.get("arms")
    if isinstance(arms, dict):
        found += [unknown("arm", name, recipe.arms, "embedded.arms") for name in arms if name not in recipe.arms]
    return found
