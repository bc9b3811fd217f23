"""trl's SFTTrainer on prefix-shared or padded batches, with the LM head computed at labelled positions only."""

from __future__ import annotations

import contextlib
import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from trl import SFTTrainer

from peft_recipes.data.packing import (
    COUNTS,
    IGNORED,
    KEPT,
    PaddedCollator,
    SharedPrefixCollator,
    why_padded,
)
from peft_recipes.distributed import processes
from peft_recipes.kernels.packed_attention import windows_of
from peft_recipes.tasks.attention_choice import Trial, as_before, choose_attention
from peft_recipes.tasks.attention_inputs import plain_inputs
from peft_recipes.tasks.causal_losses import (
    example_sums,
    fused_example_sums,
    labelled_losses,
    largest_gap,
    logits_bytes,
    only_losses,
)
from peft_recipes.tasks.trainer import TrainerMixin
from peft_recipes.tasks.trl_metrics import TrlMetricsMixin, unread_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch.nn as nn

# Logits beyond this many bytes are left to trl's fused LM head, which computes them in chunks, and twice: that saves
# memory which a few hundred labelled positions don't need, and costs a third of a small model's step.
LOGITS_BYTES = 512 * 2**20


class Batches(NamedTuple):
    """How batches are made: their collator, why they are padded if they are, and how the kernel was chosen."""

    collator: SharedPrefixCollator | PaddedCollator
    why_padded: str | None
    attention: dict[str, Any] | None = None


class PrefixSharingMixin(TrainerMixin):
    """Let one of trl's trainers choose between prefix-shared packing and padding (data/packing.py).

    fused_head_is_exact: whether trl's fused LM head gives the log-probabilities of the model's own logits. It does not
    where the model computes more than one projection after its backbone (ModernBERT's decoder).
    """

    fused_head_is_exact = True
    shared_collator: type[SharedPrefixCollator] = SharedPrefixCollator
    padded_collator: type[PaddedCollator] = PaddedCollator

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        with adapter_dtypes_kept(model):
            super().__init__(model, *args, **kwargs)

    def choose_batches(
        self,
        padded_because: str | None,
        max_length: int,
        max_row_tokens: int,
        examples: Sequence[dict[str, Any]],
        kernel: str | None = None,
        shared: Path | None = None,
    ) -> str:
        """Set the data collator as `collator_for` chooses it; return its kind, and the reason if it pads.

        shared: the folder of a comparison, whose arms run by the same kernel where that is exact for each.
        Only how a step's examples are laid out: which they are is the same for all arms (`Task.example_order`).
        """
        options = (self.processing_class.pad_token_id, padded_because, max_length, max_row_tokens, examples)
        precision = {"half": half_precision(self.args), "compiled": self.args.torch_compile}
        chosen, self.packed_attention = as_before(
            [Path(self.args.output_dir), *([shared] if shared else [])],
            kernel,
            lambda kernel: self.collator_for(self.model, *options, kernel, **precision),
        )
        self.fused_head_is_exact = processes.from_rank_zero(partial(_fused_head_is_exact, self.model, examples[0]))
        self.data_collator = chosen.collator
        self.batches = f"padded: {chosen.why_padded}" if chosen.why_padded else "shared-prefix"
        return self.batches

    def _logits_fit(self, inputs: dict[str, Any]) -> bool:
        """Whether the model's own logits are used: those at labelled positions fit, or the fused head is not exact."""
        config = self.accelerator.unwrap_model(self.model).config
        return not self.fused_head_is_exact or (KEPT in inputs and logits_bytes(config, inputs) <= LOGITS_BYTES)

    @classmethod
    def collator_for(
        cls,
        model: nn.Module,
        pad_token_id: int,
        padded_because: str | None,
        max_length: int,
        max_row_tokens: int,
        examples: Sequence[dict[str, Any]],
        kernel: str | None = None,
        half: torch.dtype | None = None,
        compiled: bool = False,
    ) -> Batches:
        """Choose the collator: prefix-shared where it is exact, else padded.

        padded_because: the recipe's own reason to pad. examples: one batch, whose losses are computed both ways (no
        gradients) and compared before prefix-shared packing is trusted. The longest ones: a model that attends by
        position would get those wrong first. kernel: the recipe's attention kernel for packed batches; None: the
        fastest that is exact. half: the dtype of a run in half precision. compiled: whether the model will be.
        """
        base, virtual = base_model_of(model), is_prompt_learning(model)
        keeps_logits = "logits_to_keep" in inspect.signature(type(base).forward).parameters and not virtual
        padded = cls.padded_collator(pad_token_id, keeps_logits=keeps_logits)
        why = padded_because
        if any(getattr(config, "alora_invocation_tokens", None) for config in _peft_configs(model)):
            # The comparison of losses does not show it: an untrained adapter changes nothing.
            why = why or "its adapter looks for its invocation tokens once per sequence"
        if compiled and any(window and window < max_length for window in windows_of(base.config.get_text_config())):
            why = why or "a compiled model has one mask for all layers, and some look back a few tokens alone"
        why = why or why_padded(base, max_length, virtual)
        if why is not None:
            return Batches(padded, why)
        while len(examples) > 2 and logits_bytes(base.config, padded(examples)) > LOGITS_BYTES:
            examples = examples[: len(examples) // 2]
        shared = partial(cls.shared_collator.for_model, base, pad_token_id, max_row_tokens)
        config = base.config.get_text_config()
        trial = Trial(model, config, shared, examples, padded(examples), largest_gap, only_losses, half, compiled)
        # Rank 0 alone is sure to hold the weights by now, and all ranks must choose the same.
        chosen = processes.from_rank_zero(partial(choose_attention, trial, kernel))
        if chosen.kernel is None:
            gap = min(chosen.gaps.values(), default=float("inf"))
            why = f"the losses of a first batch differ by {gap:.1e} between packing and padding on this model"
            return Batches(padded, why, chosen.facts())
        return Batches(shared(chosen.kernel), None, chosen.facts())


@contextlib.contextmanager
def adapter_dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Keep the dtype of trainable weights, which trl casts to bf16 on a quantised base.

    In bf16 AdamW's small steps are lost, and the other arms would be trained in another precision.
    """
    trainable = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in trainable and parameter.dtype != trainable[name].dtype:
            parameter.data = trainable[name].to(parameter.device)


class CausalTrainer(TrlMetricsMixin, PrefixSharingMixin, SFTTrainer):
    """trl's SFTTrainer on our collators' batches; evaluation gives the loss of every example."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """The mean over the labelled tokens of the optimizer step, over all its batches and ranks, as in trl."""
        other_terms = self.label_smoother is not None or self.aux_loss_enabled or self.compute_loss_func is not None
        if other_terms or self.args.loss_type != "nll":
            with unread_metrics(model) as called:
                loss = super().compute_loss(called, plain_inputs(model, inputs), False, num_items_in_batch)
            return (loss, None) if return_outputs else loss
        if self._logits_fit(inputs):
            total, count = labelled_losses(model, inputs)[0].sum(), (inputs["labels"][:, 1:] != IGNORED).sum()
        else:
            output = model(**plain_inputs(model, inputs), use_cache=False, fused_lm_head=True)
            total, count = -output.log_probs.sum(), output.label_mask.sum()
        loss = self.step_mean(total, count, num_items_in_batch, model)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None):
        """Return, instead of logits, [examples, 3]: summed loss, labelled tokens and correctly predicted tokens."""
        counts = inputs.pop(COUNTS)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._logits_fit(inputs):
                sums = example_sums(model, inputs, counts.examples)
            else:
                output = model(**plain_inputs(model, inputs), use_cache=False, fused_lm_head=True)
                sums = fused_example_sums(output, inputs, counts.examples)
        return None, sums, torch.zeros(len(sums), 1, device=sums.device)


@torch.no_grad()
def _fused_head_is_exact(model: nn.Module, example: dict[str, Any]) -> bool:
    """Compare trl's fused LM head with the model's own logits on the first tokens of an example."""
    ids = torch.tensor([next(v for k, v in example.items() if k.endswith("_ids") and v)[:64]])
    ids = ids.to(next(model.parameters()).device)
    inputs, was_training = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, model.training
    model.eval()
    try:
        logits = model(**inputs, use_cache=False).logits[:, -ids.shape[1] : -1].float()
        own = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        fused = model(**inputs, labels=ids, use_cache=False, fused_lm_head=True).log_probs[:, -own.shape[1] :]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    finally:
        model.train(was_training)
    return bool(torch.allclose(own, fused.float(), rtol=1e-3, atol=1e-3))


def half_precision(args: Any) -> torch.dtype | None:
    """The dtype of a run in half precision, by its TrainingArguments."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def base_model_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether an adapter puts virtual tokens before the input."""
    return any(config.is_prompt_learning for config in _peft_configs(model))


def _peft_configs(model: nn.Module) -> list[Any]:
    return list(getattr(model, "peft_config", {}).values())
