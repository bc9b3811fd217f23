"""Finds a recipe by name or path, and lays `--embedded` and `--set` over it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_recipes.arm_names import choose_arms
from peft_recipes.errors import RecipeError, nearest, unknown, within
from peft_recipes.methods import METHODS
from peft_recipes.plain import from_yaml, read_yaml
from peft_recipes.recipe import Recipe

# In a wheel the recipes travel inside the package; in a checkout they stand beside it.
_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")


def recipe_files() -> dict[str, Path]:
    """The shipped recipes: name -> module file, in the order of their names."""
    for folder in _FOLDERS:
        files = {p.stem.replace("_", "-"): p for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")}
        if files:
            return files
    return {}


def load_recipe(name_or_path: str | Path, *, embedded: bool = False, changes: Iterable[str] = ()) -> Recipe:
    """The recipe of a shipped name, a .py file with a `recipe` in it, or a .yaml file.

    embedded: lay the recipe's own stand-ins over it first. changes: "KEY=VALUE" with dotted keys, laid over last.
    Raises RecipeError: no such recipe (names the nearest), a file without a recipe, an unknown key, a wrong value.
    """
    return changed(_read(str(name_or_path)), embedded, changes)


def changed(recipe: Recipe, embedded: bool = False, changes: Iterable[str] = ()) -> Recipe:
    """The recipe with its stand-ins laid over it, if asked for, and then the "KEY=VALUE" changes."""
    if embedded and not recipe.embedded:
        raise RecipeError(f"Recipe '{recipe.name}' has no embedded stand-ins; run it without --embedded.")
    if embedded:
        recipe = recipe.with_changes(recipe.embedded)
    listed = list(changes)
    return apply_changes(recipe, listed) if listed else recipe


def _read(name: str) -> Recipe:
    files = recipe_files()
    if name in files:
        return _from_module(files[name])
    path = Path(name)
    if path.suffix in (".py", ".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"There is no recipe file {path}.{nearest(path.stem, files)}")
        if path.suffix == ".py":
            return _from_module(path)
        with within(path.name):
            return Recipe.from_yaml(path)
    raise RecipeError(unknown("recipe", name, files) + " Or a path to a .py or .yaml file.")


def _from_module(path: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(f"peft_recipes_user.{path.stem}", path)
    assert spec is not None and spec.loader is not None  # only None for suffixes that are not Python's
    module = importlib.util.module_from_spec(spec)
    try:
        with within(path.name):
            spec.loader.exec_module(module)
    except RecipeError:
        raise
    except Exception as error:
        line = _line_in(path, error)
        raise RecipeError(f"{path}{line} can't be run as a recipe: {type(error).__name__}: {error}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path} has no `recipe = Recipe(...)` at its top level.")
    return recipe


def _line_in(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno},"
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = f", line {trace.tb_lineno},"
        trace = trace.tb_next
    return line


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


def resolved_recipe(path: Path) -> Recipe:
    """The recipe.yaml of a run, which alone reproduces it."""
    if not path.is_file():
        raise RecipeError(f"{path} is not there: the folder is not a run of peft-recipes.")
    with within(str(path)):
        return Recipe.from_dict(read_yaml(path))
