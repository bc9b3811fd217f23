"""LoRA in its simplest form, which every server takes: A and B of linear layers, one rank and one scale."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.embeddings import replaces_embeddings
from peft_recipes.adapters.saved import CONFIG, WEIGHTS, SavedAdapter

if TYPE_CHECKING:
    import torch
    from torch import nn

# Options of LoraConfig that change what an adapter computes, and what people call them.
_VARIANTS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "lora_bias": "a bias in B (lora_bias)",
    "kasa_config": "KaSA", "arrow_config": "Arrow", "monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA", "layer_replication": "replicated layers (layer_replication)",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
}  # fmt: skip
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


def obstacles(saved: SavedAdapter, base: nn.Module | None = None, embeddings: bool = False) -> list[str]:
    """What an adapter has that A and B of linear layers can't express, in words; empty for a plain LoRA.

    base: the loaded base, to find embeddings that the adapter replaces. embeddings: whether A and B of an embedding are
    taken too.
    """
    if saved.method != "LORA":
        return [f"it is {saved.method}, not LoRA"]
    config = saved.config
    found = [f"{name}" for option, name in _VARIANTS.items() if getattr(config, option, None)]
    if modules := getattr(config, "modules_to_save", None):
        found.append(f"modules of its own (modules_to_save: {', '.join(sorted(modules))})")
    if saved.trains_biases:
        found.append(f"trained biases (bias: {config.bias})")
    if saved.initialised_from_base:
        found.append(f"an initialisation that changes the base (init_lora_weights: {config.init_lora_weights})")
    if not embeddings and any(part in name for name in saved.tensors for part in _EMBEDDING):
        found.append("LoRA on an embedding")
    elif base is not None and not modules and replaces_embeddings(saved, base):
        found.append("embeddings of its own")
    return found


def is_uniform(saved: SavedAdapter) -> bool:
    """Whether every layer has the same rank and the scale alpha / rank, which readers of adapters take for granted."""
    config = saved.config
    return not (config.rank_pattern or config.alpha_pattern or config.use_rslora or config.lora_alpha <= 0)


def lora_tensors(saved: SavedAdapter) -> tuple[dict[str, torch.Tensor], int, float]:
    """Return A and B of each layer by their names in the file, their rank and alpha: one of each for all layers.

    A uniform adapter is returned as it is. Otherwise each layer's scale goes into its B, A and B get zeros up to the
    largest rank, and alpha is that rank, so that the scale is 1: the products, and so the outputs, stay the same.
    """
    tensors = {name: tensor for name, tensor in saved.tensors.items() if _is(name, "A") or _is(name, "B")}
    if is_uniform(saved):
        return tensors, saved.config.r, saved.config.lora_alpha
    import torch

    rank = max(tensor.shape[0] for name, tensor in tensors.items() if _is(name, "A"))
    result = {}
    for name, tensor in tensors.items():
        if _is(name, "A"):
            rows = torch.zeros(rank - tensor.shape[0], tensor.shape[1], dtype=tensor.dtype)
            result[name] = torch.cat([tensor, rows])
        else:
            columns = torch.zeros(tensor.shape[0], rank - tensor.shape[1], dtype=tensor.dtype)
            module = name.removeprefix("base_model.model.").partition(".lora_")[0]
            scale = _scale(saved.config, module, tensor.shape[1])
            result[name] = torch.cat([(tensor.float() * scale).to(tensor.dtype), columns], dim=1)
    return result, rank, float(rank)


def _is(name: str, which: str) -> bool:
    """Whether a tensor is the "A" or the "B" of a layer or an embedding."""
    return f".lora_{which}." in name or name.endswith(f".lora_embedding_{which}")


def _scale(config: Any, module: str, rank: int) -> float:
    """The factor of a layer's B A, as PEFT computes it: alpha / rank, or alpha / sqrt(rank) under rsLoRA."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def write_lora(
    folder: Path, saved: SavedAdapter, tensors: dict[str, torch.Tensor], rank: int, alpha: float, base: str
) -> None:
    """Write tensors as a PEFT folder with the targets of a saved adapter and one rank and alpha."""
    from safetensors.torch import save_file

    config = json.loads((saved.folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "use_rslora": False,
               "rank_pattern": {}, "alpha_pattern": {}, "base_model_name_or_path": base,
               "inference_mode": True, "init_lora_weights": True}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
