"""Locate the base of a run's adapter: found, made or trained here, so that plain PEFT can load the adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_recipes.adapters.saved import RECIPE_FILE
from peft_recipes.cards.metadata import is_repo_id
from peft_recipes.errors import RecipeError
from peft_recipes.models import bases
from peft_recipes.runs.folder import resolved_recipe
from peft_recipes.tasks.registry import task_of


def base_folder(adapter: str | Path) -> str:
    """Return what `from_pretrained` takes for the base of an adapter: a folder, or the Hub's id.

    adapter: the folder of a run, or its repository on the Hub. A stand-in is made on first use; a base that is on no
    Hub is trained first, as the run's recipe.yaml says. Both are kept. Raises RecipeError if there is no such run.
    """
    recipe = resolved_recipe(run_files(adapter, [RECIPE_FILE]) / RECIPE_FILE)
    if recipe.model != bases.SMALL_CNN:
        return bases.location(recipe.model)
    task = task_of(recipe)
    return str(task.base_folder(task.prepare()))


def run_files(adapter: str | Path, names: Sequence[str]) -> Path:
    """Return a folder with these files of a run: `adapter` itself if it is a folder, else a download from the Hub."""
    if Path(adapter).is_dir():
        return Path(adapter)
    from huggingface_hub import snapshot_download

    repo_id = str(adapter)
    if not is_repo_id(repo_id) or "/" not in repo_id or repo_id.startswith((".", "/", "~")):
        raise RecipeError(f"{repo_id} is no folder here and can't be a repository of the Hub (ORG/NAME).")
    with bases.hub_errors("adapter", repo_id):
        return Path(snapshot_download(repo_id, allow_patterns=list(names)))
