"""What our trainers add to the libraries' own: counts of what steps used, and one order of examples for all arms."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from peft_recipes.data.packing import COUNTS, Counts
from peft_recipes.distributed import processes
from peft_recipes.kernels import activations
from peft_recipes.tasks.checkpoint_mixin import CheckpointMixin
from peft_recipes.tasks.method_mixin import MethodMixin
from peft_recipes.tasks.step_sampler import Shares, shared


class CountingMixin(MethodMixin, CheckpointMixin):
    """Counts what goes through `training_step`: non-padding tokens, computed positions, padding, examples."""

    batches = "padded"  # how its batches are made, and why where that was not the first choice
    whole_batch = 8  # the recipe's per_device_train_batch_size, which is that of one process

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._counts: list[list[Counts]] = [[]]  # of each optimiser step, its micro-batches

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._counts[-1].append(inputs.pop(COUNTS) if COUNTS in inputs else _counted(inputs))
        if self.accelerator.sync_gradients:
            self._counts.append([])
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop(COUNTS, None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler | None:
        """The library's sampler; where it groups by length, drawn from the data's own seed.

        By itself it draws from the global state, which each arm (its adapter, its dropout) leaves in another place.
        """
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths and self.args.train_sampling_strategy == "group_by_length":  # features know their texts' lengths
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
            sampler = LengthGroupedSampler(batch, lengths=lengths)
        else:
            sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        sampler.batch_size *= self.args.world_size  # of the whole step, so that the order is one process's
        return _Reseeded(sampler, self.args.data_seed)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The library's; with several processes, this one's share of the steps that one process would take."""
        loader = super().get_train_dataloader()
        if self.args.world_size == 1 or self.args.train_sampling_strategy == "batch_rebalance":
            return loader
        drop = len(loader.dataset) % self.whole_batch if self.args.dataloader_drop_last else 0
        return shared(
            loader, self.args.gradient_accumulation_steps, self.args.world_size, self.args.process_index, drop
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        """In order. Where training groups by length, the library would shuffle evaluation as well."""
        with _changed(self.args, "train_sampling_strategy", "random"):
            return super()._get_eval_sampler(eval_dataset)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        """Every example, also where training drops the last batch."""
        with _changed(self.args, "dataloader_drop_last", False):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        """Every example, also where training drops the last batch."""
        with _changed(self.args, "dataloader_drop_last", False):
            return super().get_test_dataloader(*args, **kwargs)

    def step_counts(self) -> list[Counts]:
        """The counts of each optimiser step, in order, over all processes (which must all ask)."""
        each = processes.all_gather([_sum(step) for step in self._counts if step])
        return [_sum(same) for same in zip(*each, strict=True)]

    def own_tokens(self) -> int:
        """Tokens that this process trained on."""
        return sum(int(part.tokens) for step in self._counts for part in step)

    def examples_of_step(self, number: int) -> list[int]:
        """The places in the training data of what an optimiser step (from 1) saw, in all processes."""
        loader, accumulated = self.get_train_dataloader(), self.args.gradient_accumulation_steps
        steps_an_epoch = max(math.ceil(len(loader) / accumulated), 1)
        epoch, step = divmod(number - 1, steps_an_epoch)
        loader.set_epoch(epoch)
        if isinstance(loader.batch_sampler, Shares):
            return next(itertools.islice(loader.batch_sampler.steps(), step, None), [])
        batches = itertools.islice(iter(loader.batch_sampler), step * accumulated, (step + 1) * accumulated)
        return [int(i) for batch in batches for i in batch]

    def restore_counts(self, counts: list[Counts]) -> None:
        """The counts of the steps before a checkpoint, of all processes, which from now on the main one keeps."""
        mine = counts if processes.is_rank_zero() else [Counts(0, 0, 0, 0)] * len(counts)
        self._counts = [*([step] for step in mine), []]


class _Reseeded(torch.utils.data.Sampler):
    """A length-grouped sampler whose order follows from the seed and the epoch: the same whenever a run is resumed."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class ClassificationTrainer(CountingMixin, Trainer):
    """transformers' Trainer, counting, with the loss said once: the mean over the examples of an optimiser step.

    Left to the models, it is a mean of each micro-batch, which the library then divides by the accumulation steps for
    some models and not for others.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that `compute_loss` is told the step's examples

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        labels = inputs["labels"]
        with activations.recomputed():
            output = model(**{k: v for k, v in inputs.items() if k != "labels"})
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = cross_entropy(output.logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages what was divided by the examples of all
        loss = self.penalised(loss, model)
        return (loss, output) if return_outputs else loss


@contextlib.contextmanager
def _changed(arguments: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(arguments, name)
    setattr(arguments, name, value)
    try:
        yield
    finally:
        setattr(arguments, name, before)


def _counted(inputs: dict[str, Any]) -> Counts:
    """The counts of a padded batch with a 2-D mask, or of one without any (images)."""
    mask = inputs.get("attention_mask")
    examples = next(v for v in inputs.values() if isinstance(v, torch.Tensor)).shape[0]
    if mask is None:
        return Counts(0, 0, 0, examples)
    tokens = mask.sum()  # stays a tensor: reading it here would make a GPU wait
    return Counts(tokens, mask.numel(), mask.numel() - tokens, examples)


def _sum(parts: list[Counts]) -> Counts:
    return Counts(*(int(sum(int(getattr(part, f.name)) for part in parts)) for f in fields(Counts)))
