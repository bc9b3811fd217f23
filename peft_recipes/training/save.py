"""Save what a run trained (the adapter alone, the head alone, or the full model), and restore it on a fresh base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from peft_recipes.arms.apply import OWN_FILES, apply_arm
from peft_recipes.errors import RecipeError
from peft_recipes.models.virtual_tokens import read_last_token
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import file_sizes

if TYPE_CHECKING:
    import torch.nn as nn


def save(model: nn.Module, arm: Arm, recipe: Recipe, folder: Path, processor: Any) -> dict[str, int]:
    """Save the checkpoint of an arm; return the sizes in bytes of the files that restore it on the base."""
    if arm.peft is not None:
        model.peft_config["default"].base_model_name_or_path = recipe.model
        # "auto" would ask the Hub whether the vocabulary grew; it never does here.
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run writes its own
        if recipe.dataset.chat_template is not None:  # the base has another, or none
            processor.save_pretrained(folder)
        return file_sizes(folder, ["adapter_model.safetensors", "adapter_config.json"])
    if arm.method in OWN_FILES:
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / OWN_FILES[arm.method])
        return file_sizes(folder, [OWN_FILES[arm.method]])
    model.save_pretrained(folder)
    sizes = file_sizes(folder)
    if processor is not None:
        processor.save_pretrained(folder)  # a folder that loads by itself; not counted, the base has the same
    return {name: size for name, size in sizes.items() if name.startswith(("model", "config", "generation_config"))}


def restore(base: nn.Module, new_weights: list[str], arm: Arm, recipe: Recipe, folder: Path) -> nn.Module:
    """Load a saved arm onto a fresh base. Raises RecipeError where a tensor is missing, stray or of another shape."""
    if arm.peft is not None:
        from peft import PeftModel
        from peft.utils import load_peft_weights

        model = PeftModel.from_pretrained(base, folder)
        read_last_token(model)
        _check_complete(model, load_peft_weights(str(folder), device="cpu"), folder)
        return model
    if arm.method in OWN_FILES:
        path = folder / OWN_FILES[arm.method]
        saved = load_file(path)
        unexpected = base.load_state_dict(saved, strict=False).unexpected_keys
        if unexpected:
            raise RecipeError(f"{path}: {unexpected[0]} is no weight of this base.")
        model, _ = apply_arm(base, arm, recipe.task, new_weights)
        if missing := [name for name, p in model.named_parameters() if p.requires_grad and name not in saved]:
            raise RecipeError(f"{path}: {missing[0]} is missing.")
        return base
    return base.from_pretrained(folder, dtype=torch.float32)


def _check_complete(model: nn.Module, saved: dict[str, torch.Tensor], folder: Path) -> None:
    """Raise where keys are missing: PEFT only warns, and the base's output comes back (peft#2566)."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, stray = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    wrong = [name for name in set(wanted) & set(saved) if wanted[name].shape != saved[name].shape]
    if missing or stray or wrong:
        first = (missing or stray or wrong)[0]
        raise RecipeError(
            f"{folder}: the adapter does not fit its base: {len(missing)} tensors missing, {len(stray)} not of this "
            f"model, {len(wrong)} of another shape; the first is {first}."
        )
