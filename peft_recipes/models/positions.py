"""How many positions a model has."""

from __future__ import annotations

from typing import Any


def position_limit(config: Any) -> int | None:
    """Return how many positions a model of this configuration has; None if it sets no limit."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def encoder_decoder_limits(config: Any) -> tuple[int | None, int | None]:
    """Return how many positions the encoder and the decoder have; None for one without a limit.

    T5's `n_positions` is the length that it was pretrained on: its positions are relative.
    """
    both = getattr(config, "max_position_embeddings", None)
    own = (getattr(config, f"max_{part}_position_embeddings", None) for part in ("encoder", "decoder"))
    encoder, decoder = (limit or both for limit in own)
    return encoder, decoder
