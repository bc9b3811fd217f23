"""How many positions a model has."""

from __future__ import annotations

from typing import Any


def position_limit(config: Any) -> int | None:
    """Return how many positions a model of this configuration has; None if it sets no limit."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
