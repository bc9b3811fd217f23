"""The metrics that trl's trainers log: kept as tensors during a step, and read once for each logging step.

trl reads each metric where it computes it (`.item()`), 17 times in a step of DPO and of KTO. On a GPU each of them
waits until all queued work is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from transformers import Trainer


class TrlMetricsMixin(Trainer):
    """Read the metrics of one of trl's trainers when they are logged, those of all steps since the last log at once."""

    _metrics: dict[str, dict[str, list[Any]]]  # trl's: by mode ("train", "eval") and name, a value for each batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        by_name = self._metrics["train" if self.model.training else "eval"]
        by_name.update(zip(by_name, as_numbers(list(by_name.values())), strict=True))
        super().log(logs, *args, **kwargs)


@contextlib.contextmanager
def unread_metrics(model: Any, selections: Sequence[torch.Tensor] = ()) -> Iterator[Callable[..., Any]]:
    """Let trl compute a loss and its metrics without reading a tensor; yields the model that trl has to be given.

    Only for batches that have tokens and examples of each kind that trl asks about.
    selections: what trl's calls of torch.nonzero return, in their order: [n, 1] indices that the collator knows.
    """
    mode = _Unread(selections)

    def outside(*args: Any, **kwargs: Any) -> Any:
        """Call the model, whose code may read what it likes."""
        mode.__exit__(None, None, None)
        try:
            return model(*args, **kwargs)
        finally:
            mode.__enter__()

    with mode:
        yield outside


class _Unread(TorchFunctionMode):
    """Answer what would read a tensor without reading it: numbers stay tensors, and no set is empty."""

    def __init__(self, selections: Sequence[torch.Tensor]):
        super().__init__()
        self._selections = iter(selections)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.item:
            return args[0].detach()
        if function is torch.Tensor.__bool__:
            return True
        if function is torch.nonzero:
            return next(self._selections)
        if function is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            return _Selected(*args)
        return function(*args, **(kwargs or {}))


class _Selected(NamedTuple):
    """Values where a mask of their shape is true, whose number the host does not know; trl takes their sum or mean."""

    values: torch.Tensor
    mask: torch.Tensor

    def sum(self) -> torch.Tensor:
        return self.values.masked_fill(~self.mask, 0).sum()

    def mean(self) -> torch.Tensor:
        return self.sum() / self.mask.sum()


def as_numbers(lists: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The lists with their tensors of one value as numbers, which are read together."""
    tensors = [value.reshape(()) for values in lists for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        return [list(values) for values in lists]
    dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    numbers = iter(torch.stack([tensor.to(dtype) for tensor in tensors]).tolist())
    return [[next(numbers) if isinstance(value, torch.Tensor) else value for value in values] for values in lists]
