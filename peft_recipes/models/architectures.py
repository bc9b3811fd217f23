"""Which modules of a model are its attention, its mlp, its embeddings and its head: one table, and what it answers.

PEFT hits a module when a target is its whole name or the end of it after a dot (`c_proj` hits `h.0.attn.c_proj` and
`h.0.mlp.c_proj`), or, when the targets are one string, when that regular expression matches the whole name. The names
here are as long as they must be to hit what they say and nothing else. They are those of transformers 5; tests build
every row's models and compare. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError, nearest, unknown
from peft_recipes.models.architecture_table import (
    ARCHITECTURES,
    COMPONENTS,
    GROUPS,
    Architecture,
    Component,
    Targets,
    head_modules,
)
from peft_recipes.models.module_matching import matched_modules, nearest_modules, target_names, unmatched

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Targets",
    "architecture_of",
    "component_of",
    "head_modules",
    "head_names",
    "matched_modules",
    "nearest_modules",
    "parameters_by_component",
    "target_names",
    "targets",
    "targets_of",
    "unmatched",
]


def targets(model_type: str, which: str) -> list[str] | str:
    """Names for `target_modules` that hit exactly one group of layers, in every block and never in a new head.

    `which` is "attention", "mlp", "all-linear" (both; every linear layer inside the blocks) or, for a network with
    convolutions, "convolutions". The answer is a list, or one regular expression where no list is exact (BERT's mlp).
    Raises RecipeError, naming the nearest, for a model type without a row or a group the architecture does not have.
    """
    return _group(architecture_of(model_type), which)


def targets_of(config: PreTrainedConfig, which: str) -> Targets:
    """`targets` for a model's configuration; one without a row is answered from its repeated blocks, with a note."""
    architecture = architecture_of(config)
    return Targets(_group(architecture, which), architecture.note)


def architecture_of(what: str | PreTrainedConfig) -> Architecture:
    """The row of a model type or of a configuration.

    A configuration whose model type has no row is built on the meta device (no weights) and read off its blocks; such
    a row says so in its `note`. A string without a row, and a model that can't be read, raise RecipeError.
    """
    model_type = what if isinstance(what, str) else what.model_type
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if isinstance(what, str):
        hint = " For any other architecture ask targets_of(config, which)."
        raise RecipeError(unknown("model type", model_type, ARCHITECTURES) + hint)
    from peft_recipes.models.architecture_walk import walk_config

    return walk_config(what)


def head_names(model_type: str, task: str) -> tuple[str, ...]:
    """The modules that a task puts on top of the base, as PEFT matches them (`modules_to_save`).

    `task` is a recipe's task or "masked-language-modeling"; "sft" and "dpo" have the head of "language-modeling".
    Raises RecipeError for a task that the architecture has no head for.
    """
    row = architecture_of(model_type)
    kind = "language-modeling" if task in ("sft", "dpo") else task
    if kind not in row.heads:
        raise RecipeError(unknown("task", task, row.heads, where=f"the heads of {model_type}"))
    return row.heads[kind]


def component_of(architecture: Architecture, parameter_name: str) -> Component:
    """Which part of the model a parameter belongs to.

    attention and mlp are the layers that those targets hit; the blocks' norms are "other"; everything inside the
    embedding modules (BERT's norm and ViT's class token too) is "embeddings". A layer that PEFT wrapped, and the
    adapter on it, count as the layer. Tied weights carry the embedding's name, as `named_parameters` gives them.
    """
    parts = parameter_name.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    names: dict[Component, list[str] | str] = {
        "head": [name for heads in architecture.heads.values() for name in heads],
        "embeddings": list(architecture.embeddings),
        "attention": architecture.group("attention"),
        "mlp": architecture.group("mlp"),
    }
    for component, hits in names.items():
        if any(_hit(hits, path) for path in paths):
            return component
    return "other"


def parameters_by_component(model: nn.Module) -> dict[Component, int]:
    """How many parameters each part of a real (or meta) model has; shared ones count once, so the sum is the total."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None:
        from peft_recipes.models.architecture_walk import walk

        architecture = walk(model)
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component_of(architecture, name)] += parameter.numel()
    return counts


def _group(architecture: Architecture, which: str) -> list[str] | str:
    groups = [group for group in GROUPS if architecture.group(group)]
    if which in groups:
        return architecture.group(which)
    if which in GROUPS:
        raise RecipeError(f"'{architecture.model_type}' has no {which} layers to target. Valid: {', '.join(groups)}.")
    guess = nearest(which, groups) or nearest(which.replace("_", "-"), groups)
    raise RecipeError(
        f"Unknown target group '{which}' of '{architecture.model_type}'.{guess} Valid: {', '.join(groups)}."
    )


def _hit(names: list[str] | str, path: str) -> bool:
    """PEFT's rule, without PEFT: this runs on names alone."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
