"""The operations of a training step that would make the host wait for a GPU."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_callback import CallbackHandler

# Operations whose result's value or size the host has to know.
_WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2")


class Waits(TorchDispatchMode):
    """Record the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in _WAITING or indexed:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def watched_steps(monkeypatch):
    """The waiting operations of each optimizer step, from its beginning to its end, as a step's time is measured."""
    steps, begin, end, open_modes = [], CallbackHandler.on_step_begin, CallbackHandler.on_step_end, []

    def on_step_begin(self, *args, **kwargs):
        control = begin(self, *args, **kwargs)
        open_modes.append(Waits().__enter__())
        return control

    def on_step_end(self, *args, **kwargs):
        open_modes[-1].__exit__(None, None, None)
        steps.append(open_modes.pop().found)
        return end(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CallbackHandler, "on_step_begin", on_step_begin)
        patch.setattr(CallbackHandler, "on_step_end", on_step_end)
        yield steps
