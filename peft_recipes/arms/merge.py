"""Merging an adapter into the weights of its base, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.nn as nn


def merged(model: nn.Module) -> nn.Module | None:
    """The base with the adapter merged into it; None where its method has no merged form.

    Raises RuntimeError where merging gives weights that are no numbers, which PEFT tells by a ValueError too.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError):
        return None
    except ValueError as error:  # also how PEFT refuses a merge that a method does not have
        if "NaN" in str(error):
            raise RuntimeError(f"Merging gives weights that are no numbers: {error}") from error
        return None
