"""Which modules of a model are its attention, MLP, embeddings and head, by its model type or configuration.

A target matches a module as in PEFT: it is the module's full name or the end of it after a dot (`c_proj` matches
`h.0.attn.c_proj` and `h.0.mlp.c_proj`); targets given as one string are a regular expression for the full name. The
names are those of transformers 5; tests build the models of every row and compare. Importing this module loads
neither torch nor transformers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError, nearest, unknown
from peft_recipes.models.architecture_table import ARCHITECTURES, COMPONENTS, GROUPS, Architecture, Component

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


def targets(model_type: str | PreTrainedConfig, which: str) -> list[str] | str:
    """Return `target_modules` that match exactly one group of layers, in every block and never in a new head.

    `which` is "attention", "mlp", "all-linear" (every linear layer in the blocks) or, for a convolutional network,
    "convolutions". Returns a list, or one regular expression where no list is exact (BERT's MLP). Any architecture
    works if its configuration is given instead of its model type.
    Raises RecipeError, with the nearest valid name, for a model type without a row or a group it does not have.
    """
    architecture = architecture_of(model_type)
    groups = [group for group in GROUPS if architecture.group(group)]
    if which in groups:
        return architecture.group(which)
    if which in GROUPS:
        valid = ", ".join(groups) or "none, name the layers in target_modules"
        raise RecipeError(f"'{architecture.model_type}' has no {which} layers to target. Valid: {valid}.")
    hint = nearest(which.replace("_", "-"), groups)
    raise RecipeError(
        f"Unknown target group '{which}' of '{architecture.model_type}'.{hint} Valid: {', '.join(groups)}."
    )


def architecture_of(model_type: str | PreTrainedConfig) -> Architecture:
    """Return the row of a model type or configuration.

    A configuration without a row is built on the meta device (no weights) and its blocks are inspected; the row's
    `note` says so. Raises RecipeError for a string without a row, or a model whose blocks can't be found.
    """
    name = model_type if isinstance(model_type, str) else model_type.model_type
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if isinstance(model_type, str):
        hint = " For any other architecture give the model's configuration instead of its type."
        raise RecipeError(unknown("model type", name, ARCHITECTURES) + hint)
    from peft_recipes.models.architecture_walk import walk_config

    return walk_config(model_type)


def component_of(architecture: Architecture, parameter_name: str) -> Component:
    """Return the part of the model that a parameter belongs to.

    "attention" and "mlp" are the layers those targets match; the norms of blocks are "other"; everything inside the
    embedding modules (also BERT's norm and ViT's class token) is "embeddings". A wrapped layer and its adapter count
    as the layer. Tied weights have the embedding's name, as in `named_parameters`.
    """
    parts = parameter_name.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    names: dict[Component, list[str] | str] = {
        "head": list(architecture.heads),
        "embeddings": list(architecture.embeddings),
        "attention": architecture.group("attention"),
        "mlp": architecture.group("mlp"),
    }
    matching = (component for component, group in names.items() if any(_matches(group, path) for path in paths))
    return next(matching, "other")


def parameters_by_component(model: nn.Module) -> dict[Component, int]:
    """Count the parameters of each part of a real (or meta) model; shared ones once, so that the sum is the total."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None:
        from peft_recipes.models.architecture_walk import walk

        architecture = walk(model)
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component_of(architecture, name)] += parameter.numel()
    return counts


def _matches(names: list[str] | str, path: str) -> bool:
    """Apply PEFT's rule without importing PEFT."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
