"""trl's KTOTrainer on padded batches, with the reference log-probabilities as columns; trl computes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trl import KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from peft_recipes.data.packing import COUNTS, Counts
from peft_recipes.kernels import activations
from peft_recipes.tasks.causal_trainer import adapter_dtypes_kept
from peft_recipes.tasks.example_mean import ExampleMeanMixin
from peft_recipes.tasks.preference_trainer import no_reference_adapter
from peft_recipes.tasks.trainer import TrainerMixin
from peft_recipes.tasks.trl_metrics import TrlMetricsMixin, unread_metrics

if TYPE_CHECKING:
    import torch.nn as nn

# Columns of an example, as in trl. KL: the answer of another example, from which trl estimates the KL term.
PROMPT, COMPLETION, KL_COMPLETION, LABEL = "prompt_ids", "completion_ids", "KL_completion_ids", "label"
REFERENCE, KL_REFERENCE = "ref_logps", "ref_KL_logps"
BY_LABEL = ("desirable", "undesirable")  # of a batch: [n] the indices of its examples with that label
# Columns of what evaluation predicts for each example.
PREDICTED = ("log_probability", "kl_log_probability", "reference", "kl_reference", "label")


@dataclass
class LabelledCollator:
    """Collate examples as trl does, to a padded batch, with its Counts and the indices of the examples by label.

    What is computed for the KL term counts as computed positions, not as tokens that are trained on.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = DataCollatorForUnpairedPreference(self.pad_token_id)([dict(example) for example in examples])
        masks = [batch["attention_mask"], batch["KL_attention_mask"]]
        computed, filled = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
        counts = Counts(int(masks[0].sum()), computed, computed - filled, len(examples))
        by_label = (torch.tensor([i for i, e in enumerate(examples) if bool(e[LABEL]) is wanted], dtype=torch.long)
                    for wanted in (True, False))  # fmt: skip
        return {**batch, COUNTS: counts, **dict(zip(BY_LABEL, by_label, strict=True))}


class LabelledTrainer(TrlMetricsMixin, ExampleMeanMixin, TrainerMixin, KTOTrainer):
    """trl's KTOTrainer; evaluation gives the log-probabilities of every answer."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        with no_reference_adapter(model), adapter_dtypes_kept(model):
            super().__init__(model, *args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # tokenised already

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset  # computed already, with the base before it had an adapter (reference.py)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """The mean over the examples of the optimizer step: trl's mean over a batch, weighted by its examples."""
        by_label = [inputs.pop(key) for key in BY_LABEL]
        # Of examples of one label alone trl asks which metrics there are, so it has to read their number.
        unread = all(map(len, by_label))
        with activations.recomputed(), unread_metrics(model, by_label) if unread else nullcontext(model) as called:
            loss = super().compute_loss(called, inputs, False)
        self._metrics["train" if self.model.training else "eval"].pop("num_tokens", None)  # run.json has our own counts
        examples = self.examples_in_batch
        loss = self.step_mean(loss * examples, examples, num_items_in_batch, model)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        """Return, instead of logits, [examples, PREDICTED]."""
        inputs.pop(COUNTS, None)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            log_probs = [_answer_log_probs(model, inputs, prefix) for prefix in ("", "KL_")]
        columns = [*log_probs, inputs[REFERENCE], inputs[KL_REFERENCE], inputs[LABEL]]
        predicted = torch.stack([column.float() for column in columns], dim=1)
        return None, predicted, torch.zeros(len(predicted), 1, device=predicted.device)


def _answer_log_probs(model: Any, inputs: dict[str, Any], prefix: str) -> torch.Tensor:
    """[examples] the answers' log-probabilities, with trl's LM head. prefix: "KL_" for the other examples' answers."""
    ids = inputs[f"{prefix}input_ids"]
    labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, -100)
    mask = inputs[f"{prefix}attention_mask"]
    output = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
    return output.log_probs[:, 1 - ids.shape[1] :].sum(-1)  # without virtual tokens
