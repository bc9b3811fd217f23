"""Finds a recipe by name or path, and lays `--embedded` and `--set` over it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from peft_recipes.catalog.changes import changed
from peft_recipes.errors import RecipeError, nearest, unknown, within
from peft_recipes.recipe.recipe import Recipe

# In a wheel the recipes travel inside the package; in a checkout they stand beside it.
_FOLDERS = tuple(place / "recipes" for place in Path(__file__).parents[1:3])


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
