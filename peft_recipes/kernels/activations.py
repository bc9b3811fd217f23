"""Activation functions: a fused GELU, and activations recomputed in the backward pass where that is cheap."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks


def fuse(model: nn.Module) -> None:
    """Replace GPT-2's GELU, eight operations in transformers, by torch's fused one with the same formula.

    Equal up to rounding (1e-7). The configuration, and so a saved model, does not change.
    """
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """Recompute the outputs of activation functions in the backward pass instead of storing them.

    Their inputs are stored anyway, for their own derivative. A gated layer (silu(gate) * up) stores two tensors of its
    inner width instead of three, for one more pointwise operation. The gradients are bitwise the same.
    """
    with saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(tensor: torch.Tensor) -> Any:
    """Return the tensor, or the function and the input to recompute it from."""
    node = tensor.grad_fn
    if node is None:
        return tensor
    if type(node).__name__ == "SiluBackward0":
        return F.silu, node._saved_self.detach()
    if type(node).__name__ == "GeluBackward0":
        return functools.partial(F.gelu, approximate=node._saved_approximate), node._saved_self.detach()
    # Detached: an output saved by its own node would keep the node alive, and without a backward pass (DoRA's detached
    # norms) neither would ever be freed.
    return tensor.detach()


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    function, x = packed
    with torch.no_grad():
        return function(x)
