"""What a run finds out before it loads a weight: its data, whether it was done before, whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.arms import fit_targets
from peft_recipes.data import stored
from peft_recipes.distributed import processes
from peft_recipes.errors import RecipeError
from peft_recipes.models import bases
from peft_recipes.planning.scaling import Spread
from peft_recipes.recipe import Arm, Recipe
from peft_recipes.runs import RUN_FILE, Run, check_output, read_run

if TYPE_CHECKING:
    from peft_recipes.hardware import Hardware
    from peft_recipes.tasks.base import Prepared, Task


def check_free(output: Path, folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises RecipeError where a run can't be written to its folder, or would replace one unasked."""
    check_output(output)
    if folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        what = "a finished run" if (folder / RUN_FILE).is_file() else "an unfinished run"
        raise RecipeError(f"{folder} holds {what}. Go on from it with --resume, or replace it with --overwrite.")


def data_and_targets(task: Task, recipe: Recipe, arm: str, data: Path | None) -> tuple[Prepared, Recipe]:
    """A run's data, and its recipe with targets and schedules that are its base's and its steps'.

    data: where a comparison keeps what it prepared for all its runs.
    """
    from peft_recipes import planning
    from peft_recipes.tasks.method_training import fit_schedules

    prepared = stored.read(data, recipe) if data else task.prepare()
    recipe, notes = fit_targets(recipe, bases.load_config(recipe))
    recipe, more = fit_schedules(recipe, planning.steps(recipe, prepared.rows))
    prepared.notes += [note for note in [*notes, *more] if f"'{arm}'" in note]
    return prepared, recipe


def finished(folder: Path, signature: str) -> Run | None:
    """The finished run of a folder. Raises RecipeError where it is one of another recipe, data or code."""
    done = read_run(folder)
    if done is None or not done.ok:
        return None
    if done.data.get("signature") == signature:
        return done
    raise RecipeError(f"{folder} holds a finished run of another recipe, data or code. Replace it with "
                      "--overwrite, or name another --output.")  # fmt: skip


def fitted_to_memory(task: Task, prepared: Prepared, arm: Arm | None, name: str, hardware: Hardware) -> Recipe:
    """The task's recipe, with gradient checkpointing on where the step fits only so, and a note of it.

    Raises RecipeError for an arm that will not fit.
    """
    from peft_recipes import planning

    recipe = task.recipe
    config = bases.load_config(recipe, **task.base_options(prepared))
    if arm is None or planning.surely_fits(task, config):
        return recipe
    needs = planning.memory(task, prepared, config, arm, name, _spread(hardware))
    if not needs["fits"]:
        raise RecipeError(planning.too_large(name, needs, recipe))
    if needs["gradient_checkpointing"] and "gradient_checkpointing" not in recipe.training:
        prepared.notes.append(f"arm '{name}': gradient checkpointing is on; without it the step would not fit this "
                              "machine's memory.")  # fmt: skip
        return recipe.with_changes({"training": {"gradient_checkpointing": True}})
    return recipe


def _spread(hardware: Hardware) -> Spread:
    """How this run is shared. On a CPU all processes of a machine share its memory."""
    on_one = processes.local_count() if hardware.device == "cpu" else 1
    return Spread(processes.kind(), processes.count(), on_one=on_one * processes.facts()["jobs"])
