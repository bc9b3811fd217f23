"""Simulate a training step on fake tensors, which have shapes but no data, and count the bytes that are alive."""

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
    """Count the bytes of all tensors that are alive, and their maximum so far: `live` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now until it is freed."""
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
def _fake_weights(model: nn.Module) -> Iterator[None]:
    """Within the block, the weights of a model from the meta device are fake tensors on the CPU.

    Not on "meta", since the device selects the kernels (attention above all), which decide what backward keeps.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes: dict[int, torch.Tensor] = {}  # tied weights stay tied
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fakes.setdefault(id(tensor), _fake(tensor))
        yield


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def step_memory(
    model: nn.Module,
    batch: dict[str, Any],
    loss_of: Callable[..., torch.Tensor],
    optimizer_class: Any = None,
    *,
    trains: bool = True,
) -> dict[str, int]:
    """Simulate a training step of a model from the meta device (unusable afterwards); return its bytes.

    batch: as a collator makes it. loss_of(model, batch): the loss. optimizer_class: of torch, AdamW by default.
    trains: False for a pass in evaluation mode and without gradients, such as a frozen backbone's over the data.
    Returns weights, gradients, optimizer (its states), activations (everything else at the peak, with the logits) and
    total, the peak.
    """
    with _fake_weights(model):
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = (optimizer_class or torch.optim.AdamW)(trainable)
        live = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        weights = live.live
        model.train(trains)
        with live, torch.set_grad_enabled(trains):
            inputs = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            loss = loss_of(model, inputs)
            if loss.requires_grad:
                loss.backward()
            peak = live.peak  # before the optimizer's states, which `step` allocates
            if loss.requires_grad:
                optimizer.step()
        gradients = _bytes(p for p in trainable if p.grad is not None)
        values = [value for state in optimizer.state.values() for value in state.values()]
        states = _bytes(value for value in values if isinstance(value, torch.Tensor) and value.dim() > 0)
    # From the second step on, the states are allocated while the activations are.
    peak = max(peak, weights + gradients) + states
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "activations": max(peak - weights - gradients - states, 0),
        "total": peak,
    }


def _bytes(tensors: Iterator[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loaded_libraries_bytes() -> int:
    """Resident bytes of this process: on a CPU its libraries and data are in a run's peak as well."""
    import psutil

    return psutil.Process().memory_info().rss
