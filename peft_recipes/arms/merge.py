"""Merge an adapter into the weights of its base, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.nn as nn


def merged(model: nn.Module) -> nn.Module | None:
    """Return the base with the adapter merged into it, or None if its method can't be merged.

    Raises RuntimeError if merging gives NaN weights; PEFT reports that as a ValueError, like a method it can't merge.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError):
        return None
    except ValueError as error:
        if "NaN" in str(error):
            raise RuntimeError(f"Merging gives weights that are not numbers: {error}") from error
        return None
