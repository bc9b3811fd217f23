"""What our trainers add to the libraries' own: counts of what steps used, and one order of examples for all arms."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler


class CountingMixin(Trainer):
    """Counts what goes through `training_step`: non-padding tokens, computed positions, examples."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._counts: list[tuple[torch.Tensor | int, int, int]] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        first = next(v for v in inputs.values() if isinstance(v, torch.Tensor))
        # The sum stays a tensor: reading it here would make a GPU wait.
        tokens = mask.sum() if mask is not None else 0
        self._counts.append((tokens, mask.numel() if mask is not None else 0, first.shape[0]))
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler | None:
        """The library's sampler; where it groups by length, drawn from the data's own seed.

        By itself it draws from the global state, which each arm (its adapter, its dropout) leaves in another place.
        """
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(self.args.data_seed)
        return sampler

    def step_counts(self) -> tuple[list[int] | None, list[int] | None, list[int]]:
        """Tokens, computed positions and examples of each optimiser step (tokens None where inputs have no mask)."""
        every = self.args.gradient_accumulation_steps
        steps = [self._counts[i : i + every] for i in range(0, len(self._counts), every)]
        sums = [[int(sum(int(count[k]) for count in step)) for step in steps] for k in range(3)]
        has_tokens = any(sums[1])
        return (sums[0] if has_tokens else None), (sums[1] if has_tokens else None), sums[2]
