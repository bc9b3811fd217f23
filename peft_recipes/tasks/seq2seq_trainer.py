"""transformers' Seq2SeqTrainer, with the loss as the mean over the labelled tokens of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer

from peft_recipes.data.packing import COUNTS, IGNORED, Counts
from peft_recipes.kernels import activations
from peft_recipes.kernels.token_losses import token_losses
from peft_recipes.tasks.trainer import TrainerMixin

if TYPE_CHECKING:
    import torch.nn as nn

MODEL_COLUMNS = ("input_ids", "attention_mask", "labels")
_DECODER_INPUTS = "decoder_input_ids"


class Seq2SeqCollator:
    """transformers' DataCollatorForSeq2Seq, and the batch's Counts: tokens and padding of both sides.

    The collator adds decoder_input_ids, the labels shifted by one, where the model has a method for it, which reads
    its configuration alone: the model given to it is one without weights, so that a worker can have it.
    """

    def __init__(self, tokenizer: Any, model: nn.Module):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        empty = type(base).__new__(type(base))
        torch.nn.Module.__init__(empty)
        empty.config = base.config
        self._collate = DataCollatorForSeq2Seq(tokenizer, model=empty, label_pad_token_id=IGNORED)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self._collate([{key: example[key] for key in MODEL_COLUMNS} for example in examples]))
        tokens = int(batch["attention_mask"].sum() + (batch["labels"] != IGNORED).sum())
        computed = batch["input_ids"].numel() + batch["labels"].numel()
        return {**batch, COUNTS: Counts(tokens, computed, computed - tokens, len(examples))}


class EncoderDecoderTrainer(TrainerMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer; evaluation gives the loss of every example.

    The models' own loss is a mean over each micro-batch, which accumulation and ranks would average without regard to
    their numbers of labelled tokens. Terms that a model adds to the cross-entropy (ProphetNet's future n-grams) are
    left out.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer passes num_items_in_batch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's: Seq2SeqTrainer's keeps the examples that pad the last batch of several ranks."""
        return super(Seq2SeqTrainer, self).evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, as `evaluate`."""
        return super(Seq2SeqTrainer, self).predict(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        total = labelled_losses(model, inputs, smoothing)[0].sum()
        loss = self.step_mean(total, (inputs["labels"] != IGNORED).sum(), num_items_in_batch, model)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        """Return, instead of logits, [examples, 3]: summed loss, labelled tokens and correctly predicted tokens."""
        inputs.pop(COUNTS, None)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, logits = labelled_losses(model, inputs)
        labels = inputs["labels"]
        labelled, correct = labels != IGNORED, logits.argmax(-1) == labels
        dtype = torch.float32 if losses.device.type == "mps" else torch.float64
        sums = torch.stack([column.to(dtype).sum(-1) for column in (losses, labelled, correct)], dim=-1)
        return None, sums, torch.zeros(len(sums), 1, device=sums.device)


def labelled_losses(
    model: nn.Module, inputs: dict[str, Any], label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute each label's cross-entropy by teacher forcing: losses [examples, length] (0 without a label), logits.

    A backward pass through the losses may overwrite the logits (token_losses.py).
    """
    labels = inputs["labels"]
    # Where the labels are already shifted, the model need not compute a loss of its own.
    left_out = {COUNTS, "labels"} if _DECODER_INPUTS in inputs else {COUNTS}
    with activations.recomputed():
        logits = model(**{key: value for key, value in inputs.items() if key not in left_out}).logits.float()
    flat = logits.flatten(0, 1), labels.flatten()
    if label_smoothing:
        losses = cross_entropy(*flat, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)
    else:
        losses = token_losses(*flat, IGNORED)
    return losses.view_as(labels), logits
