"""trl's SFTTrainer, counting, on shared or padded rows, its vocabulary head computed at labelled positions alone."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import has_compiled_regions, is_compiled_module
from trl import SFTTrainer

from peft_recipes.data.packing import (
    COMPLETIONS,
    COUNTS,
    EXAMPLES,
    IGNORED,
    KEPT,
    REFERENCES,
    SEGMENTS,
    PaddedCollator,
    SharedPrefixCollator,
    why_padded,
)
from peft_recipes.distributed import processes
from peft_recipes.kernels import activations
from peft_recipes.kernels.segment_attention import by_segments
from peft_recipes.kernels.token_losses import token_losses
from peft_recipes.tasks.trainer import CountingMixin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch.nn as nn

    from peft_recipes.kernels.segment_attention import Segments

# Logits beyond this many bytes are left to trl's own way, which computes them piece by piece, and twice: it saves
# memory that a few hundred labelled positions don't need, and costs a third of a small model's step.
LOGITS_BYTES = 512 * 2**20
_NOT_THE_MODELS = {"labels", EXAMPLES, COUNTS, SEGMENTS, COMPLETIONS, *REFERENCES}
_SAME_LOSS = 1e-4  # relative: fp32 rounding over a few hundred positions stays near 1e-6


class SharedRows(CountingMixin):
    """Chooses between shared and padded rows, in a trainer of trl's. The collators are classes of packing.py's or of
    like ones."""

    shared_collator: type[SharedPrefixCollator] = SharedPrefixCollator
    padded_collator: type[PaddedCollator] = PaddedCollator

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        with _dtypes_kept(model):
            super().__init__(model, *args, **kwargs)

    def choose_batches(self, wanted: str, max_length: int, max_row_tokens: int, tried: Sequence[dict[str, Any]]) -> str:
        """Sets the collator: shared rows where `wanted` and exact, else padded ones. Returns which, and why if padded.

        tried: the examples of a batch, which is computed both ways (no gradient) before shared rows are trusted: the
        longest ones, which a model that looks back by place would get wrong first.
        """
        virtual = _is_prompt_learning(self.model)
        pad = self.processing_class.pad_token_id
        self.data_collator, why = self.collator_for(self.model, pad, wanted, max_length, max_row_tokens, tried)
        if why and not virtual and self.args.train_sampling_strategy == "random":
            # Less padding. Not where the reason is this arm's own: all arms see the examples in one order.
            self.args.train_sampling_strategy = "group_by_length"
        self.batches = f"padded: {why}" if why else "shared-prefix"
        return self.batches

    @classmethod
    def collator_for(
        cls,
        model: nn.Module,
        pad: int,
        wanted: str,
        max_length: int,
        max_row_tokens: int,
        tried: Sequence[dict[str, Any]],
    ) -> tuple[SharedPrefixCollator | PaddedCollator, str | None]:
        """The collator that `choose_batches` sets, and why it pads if it does."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        virtual = _is_prompt_learning(model)
        why = None if wanted == "shared-prefix" else "as the recipe asks"
        if any(
            getattr(config, "alora_invocation_tokens", None) for config in getattr(model, "peft_config", {}).values()
        ):
            # Not seen by the trial below: an adapter that has not learnt yet changes nothing.
            why = why or "its adapter looks for its invocation once a row"
        why = why or why_padded(base, max_length, virtual)
        padded = cls.padded_collator(pad, keeps_logits=_keeps_logits(base) and not virtual)
        shared = cls.shared_collator.for_model(base, pad, max_row_tokens)
        if why is None:
            while len(tried) > 2 and logits_bytes(base.config, padded(tried)) > LOGITS_BYTES:
                tried = tried[: len(tried) // 2]
            # Of several processes the main one alone is sure to hold the weights by now, and all must choose the same.
            gap = processes.from_rank_zero(lambda: largest_gap(model, shared(tried), padded(tried)))
            if not gap <= _SAME_LOSS:
                why = f"a first batch's losses differ by {gap:.1e} between shared and padded rows on this model"
        return (padded if why else shared), why


@contextlib.contextmanager
def _dtypes_kept(model: nn.Module) -> Iterator[None]:
    """What learns stays in the precision it was made in. trl rounds an adapter on a quantised base to bf16, in which
    AdamW's small steps are lost, and which is neither what is saved nor what the other arms learn in."""
    learning = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in learning and parameter.dtype != learning[name].dtype:
            parameter.data = learning[name].to(parameter.device)


class CausalTrainer(SharedRows, SFTTrainer):
    """trl's SFTTrainer on our collators' batches, with every example's own loss when it evaluates."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """The mean over labelled tokens of the optimiser step, over all its batches and processes, as trl's own."""
        inputs = {k: v for k, v in inputs.items() if k != COUNTS}
        plain = {k: v for k, v in inputs.items() if k not in (EXAMPLES, KEPT, SEGMENTS)}
        if not self._plain_loss():
            return super().compute_loss(model, plain, return_outputs, num_items_in_batch)
        if self._direct(inputs):
            total, count = labelled_losses(model, inputs)[0].sum(), (inputs["labels"][:, 1:] != IGNORED).sum()
        else:
            output = model(**plain, use_cache=False, fused_lm_head=True)
            total, count = -output.log_probs.sum(), output.label_mask.sum()
        loss = total / torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages what was divided by the tokens of all
        loss = self.penalised(loss, model)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        """Instead of logits: [examples, 3] the summed loss, the labelled tokens and the rightly predicted ones."""
        counts = inputs.pop(COUNTS)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._direct(inputs):
                sums = example_sums(model, inputs, counts.examples)
            else:
                plain = {k: v for k, v in inputs.items() if k not in (EXAMPLES, KEPT, SEGMENTS)}
                sums = _rows_to_examples(model(**plain, use_cache=False, fused_lm_head=True), inputs, counts.examples)
        return None, sums, torch.zeros(len(sums), 1, device=sums.device)

    def _plain_loss(self) -> bool:
        """Whether the loss is the mean over labelled tokens, and not one that trl knows how to compute."""
        others = self.label_smoother is not None or self.aux_loss_enabled or self.compute_loss_func is not None
        return self.args.loss_type == "nll" and not others

    def _direct(self, inputs: dict[str, Any]) -> bool:
        """Whether the logits at labelled positions are few enough to be held."""
        config = self.accelerator.unwrap_model(self.model).config
        return KEPT in inputs and logits_bytes(config, inputs) <= LOGITS_BYTES


def labelled_losses(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where a label is predicted: losses [rows, kept] (0 where a row has none), logits and targets.

    The logits are no longer theirs after a backward pass through the losses (token_losses.py).
    """
    kept = inputs[KEPT]
    given = {k: v for k, v in inputs.items() if k not in _NOT_THE_MODELS}
    with by_segments(segments_of(model, inputs), given.get("attention_mask")), activations.recomputed():
        logits = model(**given, use_cache=False).logits.float()
    targets = inputs["labels"].index_select(1, kept + 1)
    losses = token_losses(logits.flatten(0, 1), targets.flatten(), IGNORED)
    return losses.view_as(targets), logits, targets


def segments_of(model: nn.Module, inputs: dict[str, Any]) -> Segments | None:
    """How a batch's rows are made, where its attention may run by that: not where backward computes it again."""
    recomputed = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    # What is compiled is compiled for one attention: another one each step would be compiled each step.
    compiled = is_compiled_module(model) or has_compiled_regions(model)
    return None if recomputed or compiled else inputs.get(SEGMENTS)


def example_sums(model: nn.Module, inputs: dict[str, Any], examples: int) -> torch.Tensor:
    """[examples, 3]: each example's summed loss, labelled tokens and rightly predicted ones."""
    losses, logits, targets = labelled_losses(model, inputs)
    owners = inputs[EXAMPLES].index_select(1, inputs[KEPT] + 1)
    right = logits.argmax(-1) == targets
    return _by_example(owners, targets != IGNORED, losses, right, examples)


def _rows_to_examples(output: Any, inputs: dict[str, Any], examples: int) -> torch.Tensor:
    """The same from trl's fused output, whose columns are those of the labels, moved by one."""
    owners = inputs[EXAMPLES][:, 1:]
    width = owners.shape[1]
    parts = (output.label_mask.bool(), -output.log_probs.float(), output.is_top1.bool())
    mask, losses, right = (part[:, -width:] if part.shape[1] > width else part for part in parts)
    return _by_example(owners, mask, losses, right, examples)


def _by_example(owners, mask, losses, right, examples: int) -> torch.Tensor:
    kind = torch.float32 if losses.device.type == "mps" else torch.float64
    values = torch.stack([losses.to(kind), mask.to(kind), right.to(kind)], dim=-1) * mask.unsqueeze(-1)
    sums = torch.zeros(examples, 3, dtype=kind, device=losses.device)
    return sums.index_add_(0, owners.clamp(min=0).flatten(), values.flatten(0, 1))


@torch.no_grad()
def largest_gap(model: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest relative difference of an example's loss between two batches of the same examples, no dropout."""
    examples = int(second[EXAMPLES].max()) + 1
    place = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        one, two = (example_sums(model, on_device(place, tensors(batch)), examples)[:, 0] for batch in (first, second))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):
        return float("inf")  # a model that can't take such a mask at all
    finally:
        model.train(was_training)
    return float(((one - two).abs() / two.abs().clamp(min=1e-6)).max())


def on_device(place: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def logits_bytes(config: Any, batch: dict[str, Any]) -> int:
    """Bytes of a batch's logits in fp32 at the columns that are kept."""
    return len(batch["labels"]) * len(batch[KEPT]) * config.get_text_config().vocab_size * 4


def tensors(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A batch without its counts: what the model is given, and how its rows are made."""
    return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) or k == SEGMENTS}


def _is_prompt_learning(model: nn.Module) -> bool:
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
