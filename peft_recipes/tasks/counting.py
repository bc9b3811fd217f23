"""What our trainers add to the libraries' own: counts of what steps used, and one order of examples for all arms."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from peft_recipes.data.packing import COUNTS, Counts


class CountingMixin(Trainer):
    """Counts what goes through `training_step`: non-padding tokens, computed positions, padding, examples."""

    batches = "padded"  # how its batches are made, and why where that was not the first choice

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._counts: list[Counts] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._counts.append(inputs.pop(COUNTS) if COUNTS in inputs else _counted(inputs))
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
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(self.args.data_seed)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        """In order. Where training groups by length, the library would shuffle evaluation as well."""
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def step_counts(self) -> list[Counts]:
        """The counts of each optimiser step, in order."""
        every = self.args.gradient_accumulation_steps
        return [_sum(self._counts[i : i + every]) for i in range(0, len(self._counts), every)]


class ClassificationTrainer(CountingMixin, Trainer):
    """transformers' Trainer, counting."""


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
