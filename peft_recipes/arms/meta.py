"""Arms on the meta device: names, shapes and sizes without weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.arms.apply import OWN_FILES, apply_arm
from peft_recipes.errors import RecipeError
from peft_recipes.models.meta import meta_model, new_head_weights
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch.nn as nn


def meta_checkpoint_bytes(model: nn.Module, arm: Arm) -> int:
    """Return the bytes of an arm's fp32 checkpoint tensors, without file headers, from a model on the meta device."""
    if arm.peft is not None and arm.peft.is_prompt_learning:
        return 4 * _prompt_parameters(model)
    if arm.peft is not None:
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    else:
        tensors = [p for p in model.parameters() if p.requires_grad or arm.method not in OWN_FILES]
    return 4 * sum(t.numel() for t in tensors)


def _prompt_parameters(model: nn.Module) -> int:
    """Count the numbers in a prompt method's checkpoint: the prompt encoder's output and the head.

    The output, which PEFT can't compute on the meta device, has keys and values per layer for a prefix, and otherwise
    one vector per virtual token.
    """
    config = model.peft_config["default"]
    vectors = 2 * config.num_layers if config.peft_type.value == "PREFIX_TUNING" else config.num_transformer_submodules
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder." not in n)
    return config.num_virtual_tokens * vectors * config.token_dim + head


def with_arm_on_meta(recipe: Recipe, config: Any, arm: Arm, name: str) -> tuple[nn.Module, Any]:
    """Build the base on the meta device and apply an arm; return the model and its parameter counts."""

    def build() -> tuple[nn.Module, Any]:
        model = meta_model(recipe, copy.deepcopy(config))
        return apply_arm(model, arm, recipe.task, new_head_weights(recipe, model), name)

    try:
        with torch.device("meta"):  # else PEFT allocates the adapter's weights
            return build()
    except (RuntimeError, RecipeError):  # BOFT reads its weights while it is applied
        return build()
