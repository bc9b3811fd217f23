"""A plan: parameters, targets, checkpoint, steps and memory of every arm, from configurations alone (no weights)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft_recipes.distributed.batches import split_batch
from peft_recipes.errors import RecipeError
from peft_recipes.planning.memory import memory, spread_of, surely_fits, too_large
from peft_recipes.planning.scaling import Spread
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task

__all__ = ["Spread", "memory", "plan", "spread_of", "steps", "surely_fits", "tokens", "too_large"]


def plan(
    recipe: Recipe, arms: Iterable[str] | None = None, *, trial: bool = False, spread: Spread | None = None
) -> dict[str, Any]:
    """The plan of a recipe, as `peft-recipes plan --json` prints it.

    Needs the base's configuration, not its weights; the data is looked at for the number of steps, and for the class
    names where the recipe does not say them. steps and tokens are None where the data can't be had, and `notes` says
    so. trial: the weights are loaded after all, and three steps of each arm tell how long the run will take.
    arms: as `arm_names.choose_arms` takes them. spread: over how many processes, how and with what memory each; then an
    arm's memory is one process's, and its `traffic` the bytes that each sends in a step. Raises RecipeError: an unknown
    arm, a configuration that can't be had, a target that hits nothing, a batch that does not divide.
    """
    from peft_recipes.arms.apply import fit_targets
    from peft_recipes.arms.selection import choose_arms
    from peft_recipes.hardware.device import choose
    from peft_recipes.models import bases
    from peft_recipes.planning.trial import timed
    from peft_recipes.tasks.registry import task_of

    chosen = choose_arms(recipe, arms)
    recipe, names = chosen.recipe, chosen.names
    if spread is not None:
        split_batch(recipe.training, spread.processes)
    task = task_of(recipe)
    prepared, notes = _data(recipe, task)
    rows = prepared.rows if prepared else None
    config = bases.load_config(recipe, **task.base_options(prepared))
    recipe, fitted = fit_targets(recipe, config)
    task.recipe = recipe
    planned, problems = {}, []
    for name in names:
        try:
            planned[name] = _arm(task, prepared, config, recipe.arms[name], name, spread)
            planned[name] |= {"steps": steps(recipe, rows), "tokens": tokens(task, prepared, steps(recipe, rows))}
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    if trial:
        if prepared is None:
            raise RecipeError(f"A trial needs the data. {notes[0]}")
        for name in names:
            planned[name]["trial"] = timed(recipe, task, prepared, name, planned[name]["steps"])
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "dataset": recipe.dataset.path,
        "embedded": recipe.uses_stand_ins,
        "rows": rows,
        "hardware": choose(recipe.training, recipe.threads).to_dict(),
        "processes": spread.processes if spread else 1,
        "distributed": spread.kind if spread else None,
        "arms": planned,
        "notes": [*notes, *fitted, *_architecture_notes(config), *chosen.notes],
    }


def _arm(
    task: Any, prepared: Prepared | None, config: Any, arm: Arm, name: str, spread: Spread | None
) -> dict[str, Any]:
    from peft_recipes.arms.meta import meta_checkpoint_bytes, with_arm_on_meta
    from peft_recipes.models.module_matching import matched_modules

    model, parameters = with_arm_on_meta(task.recipe, config, arm, name)
    modules = _modules(model, arm) if arm.peft is None else matched_modules(model, model.peft_config["default"])
    return {
        "method": arm.method_name,
        "learning_rate": arm.learning_rate,
        "trainable_parameters": parameters.trainable,
        "adapter_parameters": parameters.adapter,
        "head_parameters": parameters.head,
        "total_parameters": parameters.total,
        "modules": modules,
        "checkpoint_bytes": meta_checkpoint_bytes(model, arm),
        "memory": memory(task, prepared, config, arm, name, spread),
    }


def _modules(model: Any, arm: Arm) -> list[str]:
    """The modules that learn in a `full` or `head` arm: the outermost ones."""
    from peft_recipes.models.architecture_table import head_modules

    return head_modules(model) if arm.method == "head" else [name for name, _ in model.named_children()]


def steps(recipe: Recipe, rows: dict[str, int] | None) -> int | None:
    """Optimiser steps of one run on one process; None where neither max_steps nor the rows tell."""
    training = recipe.training
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    if not rows:
        return None
    batches = math.ceil(rows["train"] / training.get("per_device_train_batch_size", 8))
    updates = max(math.ceil(batches / training.get("gradient_accumulation_steps", 1)), 1)
    return math.ceil(updates * training.get("num_train_epochs", 3))


def tokens(task: Task, prepared: Prepared | None, steps: int | None) -> int | None:
    """Tokens that a run trains on: the steps' examples at the train split's mean length; None for images."""
    lengths = task.lengths(prepared, "train") if prepared else None
    if not lengths or not steps:
        return None
    training = task.recipe.training
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    rounds = training.get("num_train_epochs", 3) if training.get("max_steps", -1) <= 0 else None
    examples = len(lengths) * rounds if rounds else steps * batch
    return round(examples * sum(lengths) / len(lengths))


def _data(recipe: Recipe, task: Task) -> tuple[Prepared | None, list[str]]:
    """The data as a run will have it; without it, and a note why, where it can't be had but the plan can."""
    try:
        return task.prepare(), []
    except RecipeError as error:
        needed = recipe.task.endswith("classification") and recipe.dataset.labels is None
        if needed or recipe.dataset.path.startswith(EMBEDDED):
            raise
        return None, [f"Without the data there is no number of steps: {error}"]


def _architecture_notes(config: Any) -> list[str]:
    from peft_recipes.models.architecture_table import ARCHITECTURES
    from peft_recipes.models.architectures import architecture_of

    if config.model_type in ARCHITECTURES:
        return []
    return [note] if (note := architecture_of(config).note) else []
