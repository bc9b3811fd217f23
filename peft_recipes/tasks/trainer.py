"""What the trainers here add to transformers' Trainer: counts of each step, and one order of the examples for all arms.

The order depends on `data_seed` and the epoch alone: neither on the arm nor on the number of ranks.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from peft_recipes.data.packing import COUNTS, Counts
from peft_recipes.distributed import processes
from peft_recipes.kernels import activations
from peft_recipes.recipe.dataset import CLASSES
from peft_recipes.tasks.checkpoint_mixin import CheckpointMixin
from peft_recipes.tasks.method_mixin import MethodMixin
from peft_recipes.tasks.problem_types import PROBLEM_TYPES, ProblemType
from peft_recipes.tasks.step_sampler import StepShardSampler, shard_loader


class TrainerMixin(MethodMixin, CheckpointMixin):
    """Count tokens, computed positions, padding and examples of each step, and order the examples by seed alone.

    batches: how the batches are made ("padded", "shared-prefix", "features"), and why where it is a fallback; written
    to run.json, as is packed_attention: the attention kernel of packed batches and how it was chosen. pass_figures:
    seconds and peak_memory_bytes of a pass over the data before the first step (a frozen backbone's features, a
    reference's log-probabilities); None without one. recipe_batch_size: the recipe's
    per_device_train_batch_size, which a run on several ranks splits between them. on_data: called with the seconds that
    each step waited for its batches, collated in this process. on_answers: called while prompts are answered to be
    scored, with the number answered so far and of all.
    """

    batches = "padded"
    packed_attention: dict[str, Any] | None = None
    pass_figures: dict[str, Any] | None = None
    recipe_batch_size = 8
    on_data: Callable[[float], None] = staticmethod(lambda seconds: None)
    on_answers: Callable[[int, int], None] = staticmethod(lambda done, of: None)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._counts: list[list[Counts]] = [[]]  # of each optimizer step, its micro-batches
        self.examples_in_batch = 0  # of the batch in training_step; 0 where a rank computes a masked example

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.on_data(time.perf_counter() - start)
        return batches

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        counts = inputs.pop(COUNTS) if COUNTS in inputs else _count(inputs)
        self._counts[-1].append(counts)
        self.examples_in_batch = counts.examples
        if self.accelerator.sync_gradients:
            self._counts.append([])
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop(COUNTS, None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        """Trainer's sampler; `group_by_length` is drawn from `data_seed`.

        Trainer draws it from the global random state, which differs between arms (adapter initialisation, dropout).
        """
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(*args, **kwargs)
        # A linear probe's cached features have no tokens, but know the lengths of their texts.
        lengths = getattr(self.train_dataset, "lengths", None) or super()._get_train_sampler(*args, **kwargs).lengths
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _SeededLengthGroupedSampler(step, lengths, self.args.data_seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        """In order, where Trainer shuffles under `group_by_length`."""
        return SequentialSampler(eval_dataset)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        """Trainer's dataloader; `dataloader_drop_last` drops no example of an evaluation."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's dataloader; with several ranks, this rank's shard of the steps that one process would take."""
        loader = super().get_train_dataloader()
        if self.args.world_size == 1 or self.args.train_sampling_strategy == "batch_rebalance":
            return loader
        dropped = len(loader.dataset) % self.recipe_batch_size if self.args.dataloader_drop_last else 0
        return shard_loader(loader, self.args, dropped)

    def step_counts(self) -> list[Counts]:
        """The counts of each optimizer step, summed over all ranks, which must all call."""
        each_rank = processes.all_gather([_sum(step) for step in self._counts if step])
        return [_sum(same_step) for same_step in zip(*each_rank, strict=True)]

    def own_tokens(self) -> int:
        """Tokens that this rank trained on."""
        return sum(int(counts.tokens) for step in self._counts for counts in step)

    def restore_counts(self, counts: list[Counts]) -> None:
        """Restore the counts of the steps before a checkpoint, all ranks together; rank 0 keeps them."""
        own = counts if processes.is_rank_zero() else [Counts(0, 0, 0, 0)] * len(counts)
        self._counts = [*([step] for step in own), []]

    def examples_of_step(self, number: int) -> list[int]:
        """Indices into the training data of the examples of an optimizer step (from 1), on all ranks."""
        loader, accumulation = self.get_train_dataloader(), self.args.gradient_accumulation_steps
        steps_per_epoch = max(math.ceil(len(loader) / accumulation), 1)
        epoch, step = divmod(number - 1, steps_per_epoch)
        loader.set_epoch(epoch)
        if isinstance(loader.batch_sampler, StepShardSampler):
            return next(itertools.islice(loader.batch_sampler.steps(), step, None), [])
        batches = itertools.islice(iter(loader.batch_sampler), step * accumulation, (step + 1) * accumulation)
        return [int(i) for batch in batches for i in batch]


class _SeededLengthGroupedSampler(LengthGroupedSampler):
    """A LengthGroupedSampler whose order follows from seed and epoch, so that a resumed run has the same order."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return super().__iter__()


class ClassificationTrainer(TrainerMixin, Trainer):
    """transformers' Trainer with one definition of the loss: the mean over the labels of an optimizer step.

    The models' own loss is a mean over each micro-batch, which Trainer then divides by the accumulation steps for some
    models and not for others. problem: what the labels are; None: one class per example.
    """

    def __init__(self, *args: Any, problem: ProblemType | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.problem = problem or PROBLEM_TYPES[CLASSES]
        self.model_accepts_loss_kwargs = True  # so that Trainer passes num_items_in_batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        labels = inputs["labels"]
        with activations.recomputed():
            output = model(**{k: v for k, v in inputs.items() if k != "labels"})
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = self.problem.loss(output.logits.float(), labels, smoothing)
        loss = self.step_mean(loss, labels.numel(), num_items_in_batch, model)
        # The logits alone: encoder-decoders also return the encoder's states, which Trainer would gather.
        return (loss, {"logits": output.logits}) if return_outputs else loss


def _count(inputs: dict[str, Any]) -> Counts:
    """The counts of a padded batch with a 2-D attention mask, or of one without any (images)."""
    mask = inputs.get("attention_mask")
    examples = next(v for v in inputs.values() if isinstance(v, torch.Tensor)).shape[0]
    if mask is None:
        return Counts(0, 0, 0, examples)
    tokens = mask.sum()  # stays a tensor: reading it here would make a GPU wait
    return Counts(tokens, mask.numel(), mask.numel() - tokens, examples)


def _sum(counts: list[Counts]) -> Counts:
    return Counts(*(sum(int(getattr(each, field.name)) for each in counts) for field in fields(Counts)))
