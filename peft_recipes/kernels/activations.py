"""Activation functions: one pass over memory instead of eight, and not kept where they are cheaply had again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks


def fuse(model: nn.Module) -> None:
    """Replaces GPT-2's GELU, which transformers writes out in eight operations, by torch's one of the same formula.

    Equal up to rounding (1e-7); the configuration, and so a saved model, stays as it was.
    """
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, GELUTanh())


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """Within it, the output of an activation function is not kept for backward, but computed again from its input.

    Its input is kept anyhow, for the function's own derivative, so that a gated layer (silu(gate) * up) keeps two
    tensors of its inner width instead of three, at the price of one pointwise operation. The gradients are the same
    to the bit.
    """
    with saved_tensors_hooks(_pack, _unpack):
        yield


def _gelu(node: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    kind = node._saved_approximate
    return lambda x: F.gelu(x, approximate=kind)


_FUNCTIONS: dict[str, Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "SiluBackward0": lambda _: F.silu,
    "GeluBackward0": _gelu,
}


def _pack(tensor: torch.Tensor) -> Any:
    node = tensor.grad_fn
    if node is None:
        return tensor
    found = _FUNCTIONS.get(type(node).__name__)
    # Never the tensor itself: an output that its own node keeps would hold the node, and where no backward pass comes
    # by (DoRA's norms are detached) neither would ever be freed.
    return tensor.detach() if found is None else (found(node), node._saved_self.detach())


def _unpack(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    function, given = packed
    with torch.no_grad():
        return function(given)
