"""trl's DPOTrainer, counting, on rows that hold a pair's prompt once; the loss is trl's own, of any kind it knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from trl import DPOTrainer

from peft_recipes.data.packing import COMPLETIONS, COUNTS, EXAMPLES, IGNORED, KEPT, REFERENCES
from peft_recipes.data.preference_packing import PaddedPairsCollator, SharedPromptCollator
from peft_recipes.kernels.segment_attention import by_segments
from peft_recipes.tasks.causal_trainer import LOGITS_BYTES, SharedRows, labelled_losses, logits_bytes, segments_of

if TYPE_CHECKING:
    import torch.nn as nn

_PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")  # what trl's fused head gives
_OF_THE_LOGITS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")  # what trl logs of them
# Columns of what evaluation predicts of each pair.
PREDICTED = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens", "loss")


class PreferenceTrainer(SharedRows, DPOTrainer):
    """trl's DPOTrainer on our collators' batches, with the reference's log-probabilities in the rows.

    trl's own code makes the loss of the answers' log-probabilities; where those come from is what differs. Entropies
    and mean logits, which trl logs as well, are left out where they would cost another pass over the logits.
    """

    shared_collator = SharedPromptCollator
    padded_collator = PaddedPairsCollator

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        with _no_second_adapter(model):
            super().__init__(model, *args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # tokenised already

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "length"])]  # batches are grouped by it

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset  # computed already, on the base before it had an adapter (reference.py)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """The mean over the pairs of a batch, as trl's own."""
        loss = self._loss(model, {k: v for k, v in inputs.items() if k != COUNTS})
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        """Instead of logits: [pairs, PREDICTED]."""
        inputs.pop(COUNTS)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self._per_token(model, inputs)
            sums = answer_log_probs(found.log_probs, inputs[COMPLETIONS], None)
            lengths = inputs[COMPLETIONS][:, 1:].sum(1)
            losses = [self._loss_of(_pair(found, i), _pair_inputs(inputs, i)) for i in range(len(sums) // 2)]
        columns = [*sums.chunk(2), *(inputs[key] for key in REFERENCES), *lengths.chunk(2), torch.stack(losses)]
        predicted = torch.stack([column.float() for column in columns], dim=1)
        return None, predicted, torch.zeros(len(predicted), 1, device=predicted.device)

    def _loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._direct(inputs) or "position_ids" in inputs:
            return self._loss_of(self._per_token(model, inputs), inputs)
        plain = {k: v for k, v in inputs.items() if k not in ("labels", EXAMPLES, KEPT)}
        return super()._compute_loss(model, plain, False)

    def _loss_of(self, found: SimpleNamespace, inputs: dict[str, Any]) -> torch.Tensor:
        """trl's loss of log-probabilities that are there already: where it calls the model, it is given those."""
        mode, mask = "train" if self.model.training else "eval", inputs[COMPLETIONS]
        shown = SimpleNamespace(**{k: getattr(found, k, None) for k in _PER_TOKEN}, aux_loss=mask.new_zeros(()).float())
        for key in ("entropy", "mean_logits", "is_top1"):
            if getattr(shown, key) is None:
                setattr(shown, key, torch.zeros_like(found.log_probs, dtype=torch.bool if key == "is_top1" else None))
        plain = {"input_ids": mask, "attention_mask": mask, COMPLETIONS: mask,
                 **{key: inputs[key] for key in REFERENCES}}  # fmt: skip
        loss = super()._compute_loss(lambda **_: shown, plain, False)
        unknown = () if getattr(found, "entropy", None) is not None else _OF_THE_LOGITS
        for key in (*unknown, "num_tokens"):  # our own counts go on after a run was resumed
            self._metrics[mode].pop(key, None)
        return loss

    def _per_token(self, model: Any, inputs: dict[str, Any]) -> SimpleNamespace:
        """What the model says of each token, as trl lays it out: [2 pairs, longest sequence - 1]."""
        if self._direct(inputs):
            return SimpleNamespace(log_probs=token_log_probs(model, inputs))
        plain = {k: v for k, v in inputs.items() if k in ("input_ids", "position_ids", "attention_mask", "labels")}
        with by_segments(segments_of(model, inputs), plain["attention_mask"]):
            fused = model(**plain, use_cache=False, fused_lm_head=True)
        width = inputs["labels"].shape[1] - 1
        given = {key: getattr(fused, key)[:, -width:] for key in _PER_TOKEN if getattr(fused, key, None) is not None}
        return SimpleNamespace(**{key: _unpacked(values, inputs, None) for key, values in given.items()})

    def _direct(self, inputs: dict[str, Any]) -> bool:
        """Whether the log-probabilities are all that is asked for, and their logits few enough to be held."""
        config = self.accelerator.unwrap_model(self.model).config
        few = KEPT in inputs and logits_bytes(config, inputs) <= LOGITS_BYTES
        return few and not self.use_weighting and not self.aux_loss_enabled


def token_log_probs(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """[2 pairs, longest sequence - 1]: of each answer's tokens the log-probability, 0 elsewhere, as trl lays it out."""
    if KEPT not in inputs:  # a model that can't leave out the other positions' logits
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        logits = model(**given, use_cache=False).logits[:, :-1].float()
        found = logits.gather(-1, inputs["input_ids"][:, 1:, None])[:, :, 0] - logits.logsumexp(-1)
        return _unpacked(found, inputs, None)
    losses, _, _ = labelled_losses(model, inputs)
    return _unpacked(-losses, inputs, inputs[KEPT] + 1)


def answer_log_probs(log_probs: torch.Tensor, completions: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """[2 pairs]: log-probabilities of whole answers, of `token_log_probs` and the completion mask.

    ld_alpha: what a token counts beyond the length of the pair's shorter answer (LD-DPO); None: one, as any other.
    """
    if ld_alpha is None:
        return log_probs.sum(1)
    mask = completions[:, 1:]
    chosen, rejected = mask.sum(1).chunk(2)
    both = torch.minimum(chosen, rejected).repeat(2)[:, None]
    return torch.where(mask.cumsum(1) > both, ld_alpha * log_probs, log_probs).sum(1)


def _unpacked(values: torch.Tensor, inputs: dict[str, Any], columns: torch.Tensor | None) -> torch.Tensor:
    """Values of labelled tokens [rows, columns] at their places in [2 pairs, longest sequence - 1].

    columns: where in the rows their tokens stand; None: everywhere but at the first place.
    """
    labels, owners = inputs["labels"], inputs[EXAMPLES]
    columns = torch.arange(1, labels.shape[1], device=labels.device) if columns is None else columns
    places = inputs.get("position_ids", torch.arange(labels.shape[1], device=labels.device).expand_as(labels))
    labelled, owners, places = (t.index_select(1, columns) for t in (labels != IGNORED, owners, places))
    made = values.new_zeros(len(inputs[COMPLETIONS]), inputs[COMPLETIONS].shape[1] - 1)
    return made.index_put((owners[labelled], places[labelled] - 1), values[labelled])


def _pair(found: SimpleNamespace, number: int) -> SimpleNamespace:
    half = len(found.log_probs) // 2
    return SimpleNamespace(**{key: values[[number, half + number]] for key, values in vars(found).items()})


def _pair_inputs(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    half = len(inputs[COMPLETIONS]) // 2
    references = {key: inputs[key][number : number + 1] for key in REFERENCES}
    return {COMPLETIONS: inputs[COMPLETIONS][[number, half + number]], **references}


@contextlib.contextmanager
def _no_second_adapter(model: nn.Module) -> Iterator[None]:
    """Within it, trl finds a PeftModel's adapter copied already, and adds no copy of it as its reference.

    The reference's log-probabilities are in the rows; the copy would cost memory, and many methods allow no second one.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    plain = type(model).get_parameter
    model.add_adapter = lambda *_: None
    model.get_parameter = lambda name: plain(model, name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter
