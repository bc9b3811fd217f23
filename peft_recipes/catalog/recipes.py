"""Load a recipe by name or path, with `--embedded` and `--set` applied."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterable
from pathlib import Path

from peft_recipes.catalog.changes import changed
from peft_recipes.errors import RecipeError, nearest, unknown, within
from peft_recipes.recipe.recipe import Recipe

# A wheel carries the recipes inside the package; in a checkout they are next to it.
_FOLDERS = tuple(parent / "recipes" for parent in Path(__file__).parents[1:3])
# Python files in recipes/ that hold no recipe.
_NOT_RECIPES = ("plain_loop",)


def recipe_files() -> dict[str, Path]:
    """Return the shipped recipes in the order of their names: name -> module file."""
    for folder in _FOLDERS:
        if files := {p.stem.replace("_", "-"): p for p in sorted(folder.glob("*.py")) if p.stem not in _NOT_RECIPES}:
            return files
    return {}


def load_recipe(name_or_path: str | Path, *, embedded: bool = False, changes: Iterable[str] = ()) -> Recipe:
    """Load a shipped recipe by name, or a recipe of your own from a .py file with a `recipe` in it or a .yaml file.

    embedded: apply the recipe's own stand-ins. changes: "KEY=VALUE" with dotted keys, applied last. Raises RecipeError
    for an unknown name (with the nearest one), a file without a recipe, an unknown key or a wrong value.
    """
    return changed(_read(str(name_or_path)), embedded, changes)


def _read(name: str) -> Recipe:
    files = recipe_files()
    if name in files:
        return _from_module(files[name])
    path = Path(name)
    if path.suffix not in (".py", ".yaml", ".yml"):
        raise RecipeError(unknown("recipe", name, files) + " Or a path to a .py or .yaml file.")
    if not path.is_file():
        raise RecipeError(f"There is no recipe file {path}.{nearest(path.stem, files)}")
    if path.suffix == ".py":
        return _from_module(path)
    with within(path.name):
        return Recipe.from_yaml(path)


def _from_module(path: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(f"peft_recipes_user.{path.stem}", path)
    assert spec is not None and spec.loader is not None  # None only if the suffix is not Python's
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
    """Return ", line N," for the last line of the file in an error's traceback, or ""."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno},"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}," if lines else ""
