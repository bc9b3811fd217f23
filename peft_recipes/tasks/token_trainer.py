"""The trainer of token classification: the loss is the mean over the labelled tokens of an optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForTokenClassification, Trainer

from peft_recipes.kernels import activations
from peft_recipes.tasks.trainer import TrainerMixin

IGNORED = -100
_KEYS = ("input_ids", "attention_mask", "labels")


class TokenCollator(DataCollatorForTokenClassification):
    """transformers' collator, which pads labels with -100, on the model's inputs alone."""

    def torch_call(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return super().torch_call([{key: row[key] for key in _KEYS if key in row} for row in features])


class TokenClassificationTrainer(TrainerMixin, Trainer):
    """transformers' Trainer with the loss as a mean over the step's labelled tokens, on all micro-batches and ranks.

    frozen_backbone: only the head is trained; the backbone's dropout is off then, as a frozen backbone's should be.
    """

    def __init__(self, *args: Any, frozen_backbone: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._frozen_backbone = frozen_backbone
        self.model_accepts_loss_kwargs = True  # so that Trainer passes num_items_in_batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        if self._frozen_backbone and model.training:
            self.accelerator.unwrap_model(model).base_model.eval()
        labels = inputs["labels"]
        logits = _logits(model, inputs)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
        )
        loss = self.step_mean(loss, (labels != IGNORED).sum(), num_items_in_batch, model)
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        """Return, instead of logits, [examples, length, 2]: the likeliest tag and the cross-entropy of each token."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = _logits(model, inputs)
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return None, torch.stack([logits.argmax(-1).float(), losses], dim=-1), labels


def _logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """[batch, length, tags] logits in fp32, without those of an adapter's virtual tokens."""
    with activations.recomputed():
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    return logits[:, -inputs["labels"].shape[1] :].float()
