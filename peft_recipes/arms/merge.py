"""Merge an adapter into the weights of its base, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import torch.nn as nn


def merged(model: nn.Module) -> nn.Module | None:
    """Return the base with the adapter merged into it, or None if its method can't be merged.

    A weight that embedding and LM head share is first copied where the adapter targets one of them: PEFT would merge
    its change into both. Raises RuntimeError if merging gives NaN weights; PEFT reports that as a ValueError, like a
    method it can't merge.
    """
    base = model.get_base_model()
    tied = [config for config in _configs(base) if getattr(config, "tie_word_embeddings", False)]
    if targets_tied_embedding(model):
        _untie(base)
    try:
        merged_model = model.merge_and_unload(safe_merge=True)
        _settle_tying(merged_model, tied)
        return merged_model
    except (AttributeError, NotImplementedError):
        return None
    except ValueError as error:
        if "NaN" in str(error):
            raise RuntimeError(f"Merging gives weights that are not numbers: {error}") from error
        return None


def embedding_layers(model: nn.Module) -> list[Any]:
    """Return a model's input embedding and its LM head, adapted or not; none where it lacks one of them."""
    layers = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(model, get)())
        except (AttributeError, NotImplementedError):  # a model without tokens, or without an LM head
            return []
    return layers if all(layer is not None for layer in layers) else []


def targets_tied_embedding(model: nn.Module) -> bool:
    """Whether an adapter targets the embedding or the LM head of a base that shares one weight between the two."""
    layers = embedding_layers(model.get_base_model())
    weights = [getattr(_base_layer(layer), "weight", None) for layer in layers]
    shared = bool(weights) and weights[0] is not None and weights[0] is weights[1]
    return shared and any(hasattr(layer, "base_layer") for layer in layers)


def _base_layer(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _untie(base: nn.Module) -> None:
    """Give the LM head a copy of the weight that it shares with the embedding."""
    head = _base_layer(embedding_layers(base)[1])
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)


def _settle_tying(model: nn.Module, tied: list[Any]) -> None:
    """Share the weights of embedding and LM head again where they are equal; else say in the configs that they differ.

    Otherwise a model that is saved would have one of the two for both when it is loaded. tied: the configs that said,
    before merging, that the two are one; PEFT may have changed that.
    """
    layers = embedding_layers(model)
    if not layers or not tied:
        return
    embedding, head = (layer.weight for layer in layers)
    equal = embedding is head or (embedding.shape == head.shape and torch.equal(embedding, head))
    if equal:
        layers[1].weight = layers[0].weight
    for config in tied:
        config.tie_word_embeddings = equal


def _configs(model: nn.Module) -> list[Any]:
    """A model's configuration and that of its text part, which may be the same."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config] if text is config else [config, text]
