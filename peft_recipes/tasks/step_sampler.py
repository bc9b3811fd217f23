"""Shard each optimizer step over the ranks: together they see the examples that one process would, each once.

Accelerate's BatchSamplerShard repeats the first examples where the last step does not divide. Here that step stays as
short as in one process, and a rank without an example left computes one with its labels masked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderShard

from peft_recipes.data.packing import COUNTS, IGNORED, Counts

if TYPE_CHECKING:
    from transformers import TrainingArguments

_LOADER_OPTIONS = (
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "multiprocessing_context",
    "worker_init_fn",
)


class StepShardSampler(torch.utils.data.Sampler):
    """The batch sampler of one rank: indices of examples; -1 - index for an example whose labels are to be masked.

    order: the sampler of all examples, which must give every rank the same order. batch: examples in a rank's batch.
    accumulation: batches in a step. dropped: examples at the end that are left out.
    """

    def __init__(self, order: Any, batch: int, accumulation: int, world_size: int, rank: int, dropped: int = 0):
        self.order, self.batch, self.accumulation = order, batch, accumulation
        self.world_size, self.rank, self.examples = world_size, rank, len(order) - dropped

    @property
    def step_size(self) -> int:
        """Examples of an optimizer step, over all ranks."""
        return self.batch * self.accumulation * self.world_size

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def steps(self) -> Iterator[list[int]]:
        """The indices of each step's examples, over all ranks."""
        indices = itertools.islice(iter(self.order), self.examples)
        while step := list(itertools.islice(indices, self.step_size)):
            yield step

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            batches = self._batches(len(step)) * self.world_size
            # A stride: where the order is by length, each rank gets long examples and short ones.
            yield from (step[i::batches] or [-1 - step[0]] for i in range(self.rank, batches, self.world_size))

    def _batches(self, examples: int) -> int:
        """Batches of each rank for so many examples."""
        return math.ceil(examples / (self.batch * self.world_size))

    def __len__(self) -> int:
        full_steps, rest = divmod(self.examples, self.step_size)
        return full_steps * self.accumulation + self._batches(rest)


def shard_loader(loader: DataLoaderShard, args: TrainingArguments, dropped: int = 0) -> DataLoaderShard:
    """The dataloader of this rank's shard, made from the one that Accelerate prepared.

    dropped: examples at the end of an epoch that are left out.
    """
    all_ranks = loader.batch_sampler.batch_sampler  # under Accelerate's BatchSamplerShard
    sampler = StepShardSampler(
        all_ranks.sampler,
        all_ranks.batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
        args.process_index,
        dropped,
    )
    return DataLoaderShard(
        _MaskingDataset(loader.dataset),
        batch_sampler=sampler,
        collate_fn=_MaskingCollator(loader.collate_fn),
        device=loader.device,
        _non_blocking=loader._non_blocking,
        **{name: getattr(loader, name) for name in _LOADER_OPTIONS},
    )


class _Masked(dict):
    """An example with masked labels: computed so that all ranks do the same work, without a share in the loss."""


class _MaskingDataset(torch.utils.data.Dataset):
    """A dataset that also takes the negative indices of a StepShardSampler."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if indices[0] >= 0:
            get_many = getattr(self.dataset, "__getitems__", None)
            return get_many(indices) if get_many else [self.dataset[i] for i in indices]
        example = _Masked(self.dataset[-1 - indices[0]])
        if "labels" in example:  # a preference pair has none: it counts by the pairs of its batch, which are 0
            labels = example["labels"]
            example["labels"] = [IGNORED] * len(labels) if isinstance(labels, Sequence) else IGNORED
        return [example]


class _MaskingCollator:
    """A collator that counts the positions of masked examples as padding."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        if not isinstance(examples[0], _Masked):
            return self.collate(examples)
        batch = self.collate([dict(example) for example in examples])
        computed = batch["input_ids"].numel() if "input_ids" in batch else 0
        return {**batch, COUNTS: Counts(0, computed, computed, 0)}
