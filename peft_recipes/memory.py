"""The memory that one training step will need, before anything is loaded: the step is played on tensors without data."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
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


def step_memory(model: nn.Module, batch: dict[str, Any], loss_of: Any, optimizer: Any = None) -> dict[str, int]:
    """Bytes that a training step needs, of a model from the meta device.

    batch: as a collator makes it, real tensors. loss_of(model, batch): the loss. optimizer: of torch, AdamW by default.
    Two steps are played (the optimiser's states come with the first). Returns weights, gradients, optimizer and
    activations (what the peak holds beside the other three, the logits among it), and their total, the peak.
    """
    with without_data(model):
        trainable = [p for p in model.parameters() if p.requires_grad]
        chosen = (optimizer or torch.optim.AdamW)(trainable)
        live = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        weights = live.live
        model.train()
        with live:
            given = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            for _ in range(2):
                live.peak = live.live
                loss = loss_of(model, given)
                loss.backward()
                del loss
                chosen.step()
                chosen.zero_grad()
        gradients = sum(p.numel() * p.element_size() for p in trainable)
        states = sum(t.numel() * t.element_size() for s in chosen.state.values() for t in s.values() if t.dim() > 0)
    rest = max(live.peak - weights - gradients - states, 0)
    return {"weights": weights, "gradients": gradients, "optimizer": states, "activations": rest, "step": live.peak}
