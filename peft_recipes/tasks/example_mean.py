"""What the trainers share whose loss is a mean over the examples (pairs, answers) of an optimizer step."""

from __future__ import annotations

from typing import Any

import torch

from peft_recipes.data.packing import COUNTS


class ExampleMeanMixin:
    """Let `num_items_in_batch` count examples, over all batches and ranks of a step; trl and Trainer count labels.

    `compute_loss` multiplies the mean over its batch by the batch's examples, and `step_mean` divides by the step's.
    """

    loss_is_scaled_for_ga = True  # compute_loss gives a mean over the optimizer step

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "length"])]  # for group_by_length

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        examples = torch.full(
            (), sum(batch[COUNTS].examples for batch in batch_samples), device=device
        )  # no copy, no waiting
        return self.accelerator.gather(examples).sum() if self.args.average_tokens_across_devices else examples
