"""trl's RewardTrainer on padded pairs of token ids; trl's own code computes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from peft_recipes.data.packing import COUNTS, Counts
from peft_recipes.kernels import activations
from peft_recipes.tasks.causal_trainer import adapter_dtypes_kept
from peft_recipes.tasks.example_mean import ExampleMeanMixin
from peft_recipes.tasks.preference_trainer import metrics_of_this_rank
from peft_recipes.tasks.trainer import TrainerMixin
from peft_recipes.tasks.trl_metrics import TrlMetricsMixin, unread_metrics

if TYPE_CHECKING:
    import torch.nn as nn


@dataclass
class PairCollator:
    """Collate pairs {"chosen_ids", "rejected_ids"} to a padded batch of 2n sequences, the chosen ones first.

    Returns input_ids, attention_mask [2n, longest sequence] and the batch's Counts, whose examples are pairs.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = DataCollatorForPreference(self.pad_token_id)([dict(pair) for pair in examples])
        tokens, computed = int(batch["attention_mask"].sum()), batch["input_ids"].numel()
        return {**batch, COUNTS: Counts(tokens, computed, computed - tokens, len(examples))}


class ScoreTrainer(TrlMetricsMixin, ExampleMeanMixin, TrainerMixin, RewardTrainer):
    """trl's RewardTrainer; evaluation gives both scores of every pair."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        with adapter_dtypes_kept(model):
            super().__init__(model, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """The mean over the pairs of the optimizer step: trl's mean over a batch, weighted by the pairs in it."""
        with metrics_of_this_rank(self.accelerator), activations.recomputed(), unread_metrics(model) as called:
            loss = super().compute_loss(called, dict(inputs), False)
        self._metrics["train" if self.model.training else "eval"].pop("num_tokens", None)  # run.json has our own counts
        pairs = self.examples_in_batch
        loss = self.step_mean(loss * pairs, pairs, num_items_in_batch, model)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        """Return, instead of logits, [pairs, 2]: the scores of the chosen and of the rejected answer."""
        inputs.pop(COUNTS, None)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = model(**inputs).logits.float().squeeze(-1)
        predicted = torch.stack(scores.chunk(2), dim=1)
        return None, predicted, torch.zeros(len(predicted), 1, device=predicted.device)
