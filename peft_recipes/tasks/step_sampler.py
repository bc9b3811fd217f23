"""One step's examples shared out over processes: those that one process would see, in the same order, each once.

Accelerate's own way repeats the first examples where the last step does not divide; here that step stays as short as
one process has it, and a process that is left without an example computes one whose labels are hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard

from peft_recipes.data.packing import COUNTS, IGNORED, Counts

_KEPT = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context",
         "worker_init_fn")  # fmt: skip


class Shares(torch.utils.data.Sampler):
    """The batches of one process, as places in the data; -1 - place for an example whose labels are hidden.

    order: the sampler of all processes, which must give the same in each. batch: examples of a process's batch.
    accumulated: batches of a step. drop: examples of the whole's last batches that are left out.
    """

    def __init__(self, order: Any, batch: int, accumulated: int, processes: int, index: int, drop: int = 0):
        self.order, self.batch, self.accumulated = order, batch, accumulated
        self.processes, self.index, self.examples = processes, index, len(order) - drop

    @property
    def step(self) -> int:
        """Examples of an optimiser step, over all processes."""
        return self.batch * self.accumulated * self.processes

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def steps(self) -> Iterator[list[int]]:
        """Each step's examples, of all processes."""
        places = itertools.islice(iter(self.order), self.examples)
        while step := list(itertools.islice(places, self.step)):
            yield step

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            parts = self._batches(len(step)) * self.processes
            # Every so-many-th example: where the order is by length, each process gets long ones and short ones.
            yield from (step[at::parts] or [-1 - step[0]] for at in range(self.index, parts, self.processes))

    def _batches(self, examples: int) -> int:
        return math.ceil(examples / (self.batch * self.processes))

    def __len__(self) -> int:
        whole, rest = divmod(self.examples, self.step)
        return whole * self.accumulated + self._batches(rest)


class _Hidden(dict):
    """An example that is computed so that all processes do the same, and counts for nothing."""


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        if places[0] >= 0:
            several = getattr(self.rows, "__getitems__", None)
            return several(places) if several else [self.rows[place] for place in places]
        row = dict(self.rows[-1 - places[0]])
        labels = row["labels"]
        row["labels"] = [IGNORED] * len(labels) if isinstance(labels, Sequence) else IGNORED
        return [_Hidden(row)]


class _Collator:
    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        if not isinstance(rows[0], _Hidden):
            return self.collate(rows)
        batch = self.collate([dict(row) for row in rows])
        computed = batch["input_ids"].numel() if "input_ids" in batch else 0
        return {**batch, COUNTS: Counts(0, computed, computed, 0)}


def shared(loader: DataLoaderShard, accumulated: int, processes: int, index: int, drop: int = 0) -> DataLoaderShard:
    """The loader of one process's share, of the one that Accelerate made for it (whose order is every process's)."""
    whole = loader.batch_sampler.batch_sampler
    return DataLoaderShard(
        _Rows(loader.dataset),
        batch_sampler=Shares(whole.sampler, whole.batch_size, accumulated, processes, index, drop),
        collate_fn=_Collator(loader.collate_fn),
        device=loader.device,
        **{name: getattr(loader, name) for name in _KEPT},
    )
