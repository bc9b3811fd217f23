"""Embeddings that an adapter brings: the copies that PEFT stores next to it, and vocabularies of another size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.adapters.saved import SavedAdapter
from peft_recipes.arms.merge import embedding_layers

if TYPE_CHECKING:
    import torch.nn as nn

_PREFIX = "base_model.model."


def fit_vocabulary(saved: SavedAdapter, base: nn.Module) -> None:
    """Resize the base's embeddings to those stored with the adapter: it was trained with tokens added or cut."""
    rows = {len(tensor) for layer, tensor in _stored_embeddings(saved, base) if len(tensor) != len(layer.weight)}
    if rows:
        base.resize_token_embeddings(max(rows), mean_resizing=False)


def replaces_embeddings(saved: SavedAdapter, base: nn.Module) -> bool:
    """Whether loading the adapter changes the base's own embeddings: their size, or their values.

    PEFT stores a copy of an embedding that is a target, which is most often the base's own.
    """
    replaced = saved.config.modules_to_save or () if hasattr(saved.config, "modules_to_save") else ()
    for layer, tensor in _stored_embeddings(saved, base):
        if len(tensor) != len(layer.weight):
            return True
        name = _name(base, layer).rpartition(".")[2]
        weight = layer.weight.detach().to("cpu", tensor.dtype)
        if name not in replaced and not torch.equal(weight, tensor):
            return True
    return False


def _stored_embeddings(saved: SavedAdapter, base: nn.Module) -> list[tuple[Any, torch.Tensor]]:
    """The base's input embedding and LM head, each with the weight that is stored with the adapter, where one is."""
    found = []
    for layer in embeddings_of(base):
        name = _name(base, layer)
        for key in (f"{_PREFIX}{name}.weight", f"{_PREFIX}{name}.base_layer.weight"):
            if key in saved.tensors:
                found.append((layer, saved.tensors[key]))
    return found


def embeddings_of(base: nn.Module) -> list[Any]:
    """The input embedding and the LM head of a model, or what it has of them."""
    if layers := embedding_layers(base):
        return layers
    try:
        return [layer for layer in [base.get_input_embeddings()] if layer is not None]
    except (AttributeError, NotImplementedError):  # an image model
        return []


def _name(base: nn.Module, layer: Any) -> str:
    return next((name for name, module in base.named_modules() if module is layer), "")
