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
    """Bytes of the tensors that an arm's checkpoint will hold (file headers apart), from a model on the meta device."""
    if arm.peft is not None and arm.peft.is_prompt_learning:
        return 4 * _prompt_numbers(model)
    if arm.peft is not None:
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    elif arm.method in OWN_FILES:
        tensors = [p for p in model.parameters() if p.requires_grad]
    else:
        tensors = list(model.parameters())
    return sum(t.numel() * 4 for t in tensors)  # fp32


def _prompt_numbers(model: nn.Module) -> int:
    """What is stored of learnt prompts: what their encoder gives, which PEFT can't compute without weights, and a head.

    A prefix has keys and values for each layer, the others one vector a token.
    """
    config = model.peft_config["default"]
    each = 2 * config.num_layers if config.peft_type.value == "PREFIX_TUNING" else config.num_transformer_submodules
    head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "prompt_encoder." not in n)
    return config.num_virtual_tokens * each * config.token_dim + head


def with_arm_on_meta(recipe: Recipe, config: Any, arm: Arm, name: str) -> tuple[nn.Module, Any]:
    """The base on the meta device with an arm applied, and its counts: what a plan and a preflight need, no weights."""

    def applied() -> tuple[nn.Module, Any]:
        model = meta_model(recipe, copy.deepcopy(config))
        return apply_arm(model, arm, recipe.task, new_head_weights(recipe, model), name)

    try:
        with torch.device("meta"):  # PEFT would make the adapter's own weights for real
            return applied()
    except (RuntimeError, RecipeError):  # a method that reads its weights while it is put on (BOFT)
        return applied()
