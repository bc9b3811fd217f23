"""How many positions a model has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.nn as nn

# The last part of the names of position tables: BERT's and RoBERTa's, GPT-2's, OPT's and BART's, Flaubert's.
_TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions")


def position_limit(config: Any) -> int | None:
    """Return how many positions a model of this configuration has; None if it sets no limit."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def learnt_positions(model: nn.Module) -> int | None:
    """Return how many tokens fit the model's table of positions, the smallest of several; None if it computes them.

    RoBERTa's family begins behind its padding id (514 rows hold 512 tokens), OPT and BART behind their offset of 2.
    The model may be on the meta device.
    """
    from torch import nn

    limits = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES:
            before = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(module.num_embeddings - before)
    # GPT-J's and CodeGen's tables are computed once, and are buffers.
    limits += [
        len(table) for path, table in model.named_buffers() if path.rpartition(".")[2] in _TABLES and table.dim() == 2
    ]
    limits += [limit for limit in [position_limit(model.config)] if limits and limit]
    return min(limits, default=None)


def encoder_decoder_limits(config: Any) -> tuple[int | None, int | None]:
    """Return how many positions the encoder and the decoder have; None for one without a limit.

    T5's `n_positions` is the length that it was pretrained on: its positions are relative.
    """
    both = getattr(config, "max_position_embeddings", None)
    own = (getattr(config, f"max_{part}_position_embeddings", None) for part in ("encoder", "decoder"))
    encoder, decoder = (limit or both for limit in own)
    return encoder, decoder
