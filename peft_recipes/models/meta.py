"""The base model on the meta device: names and shapes without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_recipes.kernels import activations
from peft_recipes.models import bases
from peft_recipes.models.architecture_table import head_modules
from peft_recipes.recipe.dataset import CLASSES, REGRESSION
from peft_recipes.recipe.options import HEAD_TASKS, LANGUAGE_TASKS, TASKS
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import PretrainedConfig


def label_options(labels: list[str] | None, problem_type: str | None = None) -> dict[str, Any]:
    """Return the config options of a classifier with these class names, or with one output for a regression.

    Empty if the names are unknown and there is one class per example, which a config need not say.
    """
    options = {"problem_type": problem_type} if problem_type not in (None, CLASSES) else {}
    if problem_type == REGRESSION:
        return {**options, "num_labels": 1}
    if labels is None:
        return options
    return {
        **options,
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def head_options(recipe: Recipe) -> dict[str, Any]:
    """Return the config options of a recipe's head: its classes, one output for a reward, {} for an LM head."""
    if recipe.task == "reward":
        return {"num_labels": 1}
    source = recipe.dataset
    return {} if recipe.task in LANGUAGE_TASKS else label_options(source.labels, source.problem_type)


def meta_model(recipe: Recipe, config: PretrainedConfig) -> nn.Module:
    """Build the recipe's base with its task's head on the meta device.

    Raises RecipeError where transformers has no model of this architecture for the task.
    """
    import torch
    import transformers

    with bases.hub_errors("model", recipe.model), torch.device("meta"):
        model = getattr(transformers, TASKS[recipe.task].auto_class).from_config(
            config,
            trust_remote_code=recipe.trust_remote_code,
            **({"attn_implementation": recipe.attention} if recipe.attention else {}),
        )
    activations.fuse(model)
    return model


def new_head_weights(recipe: Recipe, model: nn.Module) -> list[str]:
    """Return the names of the head weights that the base lacks; none where the recipe pretrains its base."""
    if recipe.pretraining is not None or recipe.task not in HEAD_TASKS:
        return []
    heads = tuple(f"{module}." for module in head_modules(model))
    return [name for name, _ in model.named_parameters() if name.startswith(heads)]
