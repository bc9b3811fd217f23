"""A plan: parameters, targets, checkpoint, steps and memory of every arm, from configurations alone (no weights)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe import EMBEDDED, Arm, Recipe

_FP32 = 4  # bytes


def plan(recipe: Recipe, arms: Iterable[str] | None = None) -> dict[str, Any]:
    """The plan of a recipe, as `peft-recipes plan --json` prints it.

    Needs the base's configuration, not its weights; the data is looked at for the number of steps, and for the class
    names where the recipe does not say them. steps is None where the data can't be had, and `notes` says so.
    Raises RecipeError: an unknown arm, a configuration that can't be had, a target that hits nothing.
    """
    from peft_recipes import bases
    from peft_recipes.arms import fit_targets
    from peft_recipes.tasks import task_of

    names = list(recipe.arms if arms is None else arms)
    if problems := [unknown("arm", n, recipe.arms, f"recipe {recipe.name}") for n in names if n not in recipe.arms]:
        raise RecipeError(*problems)
    rows, labels, notes = _data(recipe)
    if recipe.dataset.labels is None and labels:
        recipe = recipe.with_changes({"dataset": {"labels": labels}})
    task = task_of(recipe)
    config = bases.load_config(recipe, **task.base_options(None))
    recipe, fitted = fit_targets(recipe, config)
    planned, problems = {}, []
    for name in names:
        try:
            planned[name] = _arm(task, config, recipe.arms[name], name) | {"steps": steps(recipe, rows)}
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "dataset": recipe.dataset.path,
        "embedded": recipe.uses_stand_ins,
        "rows": rows,
        "arms": planned,
        "notes": [*notes, *fitted, *_architecture_notes(config)],
    }


def _arm(task: Any, config: Any, arm: Arm, name: str) -> dict[str, Any]:
    from peft_recipes.module_matching import matched_modules
    from peft_recipes.saving import meta_checkpoint_bytes, with_arm_on_meta

    model, parameters = with_arm_on_meta(task, config, arm, name)
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
        "memory": memory(parameters.total + parameters.adapter, parameters.trainable),
    }


def _modules(model: Any, arm: Arm) -> list[str]:
    """The modules that learn in a `full` or `head` arm: the outermost ones."""
    from peft_recipes.architectures import head_modules

    return head_modules(model) if arm.method == "head" else [name for name, _ in model.named_children()]


def memory(weights: int, trainable: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimiser states (AdamW keeps two numbers a trained weight), all fp32.

    Activations come on top: they depend on batch and length, and are not in it.
    """
    parts = {"weights": weights * _FP32, "gradients": trainable * _FP32, "optimizer": 2 * trainable * _FP32}
    return {**parts, "total": sum(parts.values())}


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


def _data(recipe: Recipe) -> tuple[dict[str, int] | None, list[str] | None, list[str]]:
    """Rows a split, class names, and notes; without them where the data can't be had but the plan can."""
    from peft_recipes.data import columns, sources

    classifies = recipe.task.endswith("classification")
    try:
        splits = sources.load_splits(recipe.dataset)
        labels = columns.class_labels(splits, recipe.dataset) if classifies else None
        if recipe.task == "text-classification":
            splits, _ = columns.without_test_examples(splits, [recipe.dataset.text])
    except RecipeError as error:
        if classifies and recipe.dataset.labels is None:
            raise
        if recipe.dataset.path.startswith(EMBEDDED):
            raise
        return None, None, [f"Without the data there is no number of steps: {error}"]
    return {name: len(rows) for name, rows in splits.items()}, labels, []


def _architecture_notes(config: Any) -> list[str]:
    from peft_recipes.architectures import ARCHITECTURES, architecture_of

    if config.model_type in ARCHITECTURES:
        return []
    return [note] if (note := architecture_of(config).note) else []
