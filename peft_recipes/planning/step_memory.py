"""The memory that a training step will need, before anything is loaded: it is played on tensors without data."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    import torch.nn as nn


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there ever were: `live` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return made

    def add(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@contextlib.contextmanager
def without_data(model: nn.Module) -> Iterator[None]:
    """Within it, a model from the meta device stands on the CPU as far as its operations can tell, still without data.

    On the CPU, not on "meta", since which kernels run (attention above all) decides what is kept for backward.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, Any] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = made.setdefault(id(tensor), _stand_in(tensor))
        yield


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def step_memory(
    model: nn.Module,
    batch: dict[str, Any],
    loss_of: Callable[..., torch.Tensor],
    optimizer: Any = None,
    *,
    learns: bool = True,
) -> dict[str, int]:
    """Bytes that a training step needs, of a model from the meta device (which it leaves without use).

    batch: as a collator makes it. loss_of(model, batch): the loss. optimizer: a torch optimizer's class, AdamW by
    default. Returns weights, gradients, optimizer (its states), activations (all that the peak holds beside those,
    logits among it) and total, the peak. learns: False for a pass in evaluation mode and without gradients, such as a
    frozen backbone's over the data (other attention kernels run where there is no dropout).
    """
    with without_data(model):
        trainable = [p for p in model.parameters() if p.requires_grad]
        chosen = (optimizer or torch.optim.AdamW)(trainable)
        live = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        weights = live.live
        model.train(learns)
        with live, torch.set_grad_enabled(learns):
            given = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            loss = loss_of(model, given)
            if loss.requires_grad:
                loss.backward()
            peak = live.peak  # before the optimiser's states, which `step` makes
            if loss.requires_grad:
                chosen.step()
        gradients = sum(p.numel() * p.element_size() for p in trainable if p.grad is not None)
        states = sum(
            t.numel() * t.element_size()
            for state in chosen.state.values()
            for t in state.values()
            if isinstance(t, torch.Tensor) and t.dim() > 0
        )
    # From the second step on, the states are there while the activations are.
    peak = max(peak, weights + gradients) + states
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "activations": max(peak - weights - gradients - states, 0),
        "total": peak,
    }


def loaded_libraries_bytes() -> int:
    """What this process holds resident: on a CPU the libraries and the data are in a run's peak as well."""
    import psutil

    return psutil.Process().memory_info().rss
