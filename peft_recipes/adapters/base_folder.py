"""Where the base of a run's adapter lies: found, made or trained here, so that plain PEFT can put the adapter on it."""

from __future__ import annotations

from pathlib import Path

from peft_recipes.errors import RecipeError

RECIPE_FILE = "recipe.yaml"


def base_folder(adapter: str | Path) -> str:
    """What `from_pretrained` takes for the base of an adapter: a folder, or the Hub's id.

    adapter: the folder of a run, or its repository on the Hub. A stand-in is made on first use, a base that no Hub has
    is trained first, as the run's recipe.yaml says; both are kept. Raises RecipeError where there is no such run.
    """
    from peft_recipes.models import bases
    from peft_recipes.runs.folder import resolved_recipe

    recipe = resolved_recipe(_recipe_file(adapter))
    if recipe.model != bases.SMALL_CNN:
        return bases.location(recipe.model)

    from peft_recipes.tasks.registry import task_of

    task = task_of(recipe)
    return str(task.base_folder(task.prepare()))


def _recipe_file(adapter: str | Path) -> Path:
    if Path(adapter).is_dir():
        return Path(adapter) / RECIPE_FILE
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    from peft_recipes.models.bases import hub_errors

    try:
        with hub_errors("adapter", str(adapter)):
            return Path(hf_hub_download(str(adapter), RECIPE_FILE))
    except HFValidationError as error:
        raise RecipeError(f"{adapter} is no folder and no repository of the Hub.") from error
