"""trl's DPOTrainer on prefix-shared or padded pairs; the loss is computed by trl's own code, of any loss_type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from trl import DPOTrainer

from peft_recipes.data.packing import COMPLETIONS, COUNTS, EXAMPLES, IGNORED, KEPT, PREDICTING, REFERENCES
from peft_recipes.data.preference_packing import PaddedPairsCollator, SharedPromptCollator
from peft_recipes.tasks.attention_inputs import attention_inputs
from peft_recipes.tasks.causal_losses import kept_columns, labelled_losses
from peft_recipes.tasks.causal_trainer import PrefixSharingMixin
from peft_recipes.tasks.example_mean import ExampleMeanMixin
from peft_recipes.tasks.trl_metrics import TrlMetricsMixin, unread_metrics

if TYPE_CHECKING:
    import torch.nn as nn

_PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")  # outputs of trl's fused LM head
_LOGGED_OF_LOGITS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")  # metrics that trl logs
# Columns of what evaluation predicts for each pair.
PREDICTED = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens", "loss")


class PreferenceTrainer(TrlMetricsMixin, ExampleMeanMixin, PrefixSharingMixin, DPOTrainer):
    """trl's DPOTrainer on our collators' batches, with the reference log-probabilities as columns of the dataset.

    Only the policy's log-probabilities come from elsewhere; trl turns them into the loss. Entropy and mean logits,
    which trl logs as well, are left out where they would cost another pass over the logits.
    """

    shared_collator = SharedPromptCollator
    padded_collator = PaddedPairsCollator

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        with no_reference_adapter(model):
            super().__init__(model, *args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # tokenised already

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset  # computed already, with the base before it had an adapter (reference.py)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """The mean over the pairs of the optimizer step: trl's mean over a batch, weighted by the pairs in it."""
        if self._logits_fit(inputs) or "position_ids" in inputs:
            loss = self._loss_of(self._per_token(model, inputs), inputs)
        else:
            plain = {k: v for k, v in inputs.items() if k not in ("labels", COUNTS, EXAMPLES, KEPT, PREDICTING)}
            with metrics_of_this_rank(self.accelerator), unread_metrics(model) as called:
                loss = super()._compute_loss(called, plain, False)
        pairs = inputs[COUNTS].examples if COUNTS in inputs else self.examples_in_batch
        loss = self.step_mean(loss * pairs, pairs, num_items_in_batch, model)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        """Return, instead of logits, [pairs, PREDICTED]."""
        inputs.pop(COUNTS)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            per_token = self._per_token(model, inputs)
            sums = answer_log_probs(per_token.log_probs, inputs[COMPLETIONS], None)
            lengths = inputs[COMPLETIONS][:, 1:].sum(1)
            losses = [self._loss_of(*_one_pair(per_token, inputs, i)) for i in range(len(sums) // 2)]
        columns = [*sums.chunk(2), *(inputs[key] for key in REFERENCES), *lengths.chunk(2), torch.stack(losses)]
        predicted = torch.stack([column.float() for column in columns], dim=1)
        return None, predicted, torch.zeros(len(predicted), 1, device=predicted.device)

    def _loss_of(self, per_token: SimpleNamespace, inputs: dict[str, Any]) -> torch.Tensor:
        """trl's loss of log-probabilities computed before: trl's call of the model returns them."""
        mode, mask = "train" if self.model.training else "eval", inputs[COMPLETIONS]
        output = SimpleNamespace(
            **{key: getattr(per_token, key, None) for key in _PER_TOKEN}, aux_loss=mask.new_zeros(()).float()
        )
        for key in ("entropy", "mean_logits", "is_top1"):
            if getattr(output, key) is None:
                dtype = torch.bool if key == "is_top1" else None
                setattr(output, key, torch.zeros_like(per_token.log_probs, dtype=dtype))
        plain = {"input_ids": mask, "attention_mask": mask, COMPLETIONS: mask}
        plain |= {key: inputs[key] for key in REFERENCES}
        with metrics_of_this_rank(self.accelerator), unread_metrics(lambda **_: output) as called:
            loss = super()._compute_loss(called, plain, False)
        unknown = () if getattr(per_token, "entropy", None) is not None else _LOGGED_OF_LOGITS
        for key in (*unknown, "num_tokens"):  # our own token counts survive a resumed run
            self._metrics[mode].pop(key, None)
        return loss

    def _per_token(self, model: Any, inputs: dict[str, Any]) -> SimpleNamespace:
        """Per-token outputs of the model in trl's layout: [2 pairs, longest sequence - 1]."""
        if self._logits_fit(inputs):
            return SimpleNamespace(log_probs=token_log_probs(model, inputs))
        plain = {k: v for k, v in inputs.items() if k in ("input_ids", "position_ids", "attention_mask", "labels")}
        output = model(**plain, **attention_inputs(model, inputs), use_cache=False, fused_lm_head=True)
        width = inputs["labels"].shape[1] - 1  # without virtual tokens
        values = {key: getattr(output, key)[:, -width:] for key in _PER_TOKEN if getattr(output, key, None) is not None}
        return SimpleNamespace(**{key: _unpacked(value, inputs, None) for key, value in values.items()})

    def _logits_fit(self, inputs: dict[str, Any]) -> bool:
        """Whether the loss needs log-probabilities alone, and their logits fit into LOGITS_BYTES."""
        if self.use_weighting or self.aux_loss_enabled:
            return False
        return super()._logits_fit(inputs)


def token_log_probs(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of the answers' tokens, 0 elsewhere, in trl's layout: [2 pairs, longest sequence - 1]."""
    losses, _, _ = labelled_losses(model, inputs)
    return _unpacked(-losses, inputs, kept_columns(inputs) + 1)


def answer_log_probs(log_probs: torch.Tensor, completions: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """Log-probabilities of the answers [2 pairs], from `token_log_probs` and the completion mask.

    ld_alpha: the weight of the tokens beyond the length of the pair's shorter answer (LD-DPO); None: 1.
    """
    if ld_alpha is None:
        return log_probs.sum(1)
    mask = completions[:, 1:]
    chosen, rejected = mask.sum(1).chunk(2)
    shorter = torch.minimum(chosen, rejected).repeat(2)[:, None]
    return torch.where(mask.cumsum(1) > shorter, ld_alpha * log_probs, log_probs).sum(1)


def _unpacked(values: torch.Tensor, inputs: dict[str, Any], columns: torch.Tensor | None) -> torch.Tensor:
    """Move values of labelled tokens [rows, columns] to their positions in [2 pairs, longest sequence - 1].

    columns: the positions of the tokens in the batch; None: all but the first.
    """
    if values.dtype == torch.bool:  # which can't be added
        return _unpacked(values.byte(), inputs, columns).bool()
    labels, example_ids = inputs["labels"], inputs[EXAMPLES]
    every = torch.arange(labels.shape[1], device=labels.device)
    columns = every[1:] if columns is None else columns
    positions = inputs.get("position_ids", every.expand_as(labels))
    labelled, example_ids, positions = (
        tensor.index_select(1, columns) for tensor in (labels != IGNORED, example_ids, positions)
    )
    unpacked = values.new_zeros(len(inputs[COMPLETIONS]), inputs[COMPLETIONS].shape[1] - 1)
    # Zeros are added for what is not labelled: choosing the labelled ones would make a GPU wait for their number.
    places = (example_ids.where(labelled, 0), (positions - 1).where(labelled, 0))
    return unpacked.index_put(places, values.masked_fill(~labelled, 0), accumulate=True)


def _one_pair(
    per_token: SimpleNamespace, inputs: dict[str, Any], number: int
) -> tuple[SimpleNamespace, dict[str, Any]]:
    """The per-token outputs and the inputs of one pair of the batch."""
    both = [number, len(per_token.log_probs) // 2 + number]
    references = {key: inputs[key][number : number + 1] for key in REFERENCES}
    pair = SimpleNamespace(**{key: values[both] for key, values in vars(per_token).items()})
    return pair, {COMPLETIONS: inputs[COMPLETIONS][both], **references}


@contextlib.contextmanager
def metrics_of_this_rank(accelerator: Any) -> Iterator[None]:
    """Let trl log the metrics of this rank's pairs: gathering them needs the same number of pairs on every rank.

    The last step of an epoch has fewer on some ranks, and the processes would hang or abort.
    """
    accelerator.gather = accelerator.gather_for_metrics = lambda values, *_, **__: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics  # uncovers the methods


@contextlib.contextmanager
def no_reference_adapter(model: nn.Module) -> Iterator[None]:
    """Keep trl from adding a copy of a PeftModel's adapter as its reference, by pretending that it exists.

    The reference log-probabilities are in the dataset; the copy would cost memory, and many methods allow no second
    adapter.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    get_parameter = type(model).get_parameter
    model.add_adapter = lambda *_: None
    model.get_parameter = lambda name: get_parameter(model, name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter
