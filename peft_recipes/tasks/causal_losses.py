"""The losses of a causal language model's batch: by labelled token, by example, and compared between two batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device

from peft_recipes.data.packing import (
    COMPLETIONS,
    COUNTS,
    EXAMPLES,
    IGNORED,
    KEPT,
    PREDICTING,
    REFERENCES,
    SEGMENTS,
)
from peft_recipes.kernels import activations
from peft_recipes.kernels.token_losses import token_losses
from peft_recipes.tasks.attention_inputs import attention_inputs

if TYPE_CHECKING:
    import torch.nn as nn

_NOT_FOR_FORWARD = {"labels", EXAMPLES, COUNTS, SEGMENTS, COMPLETIONS, PREDICTING, *REFERENCES}


def labelled_losses(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute cross-entropy where a label is predicted: losses [rows, kept] (0 without a label), logits and targets.

    A backward pass through the losses overwrites the logits (token_losses.py).
    """
    kept = kept_columns(inputs)
    forward = {k: v for k, v in inputs.items() if k not in _NOT_FOR_FORWARD}
    with activations.recomputed():
        logits = model(**forward, **attention_inputs(model, inputs), use_cache=False).logits
    if KEPT not in inputs:
        logits = logits[:, -inputs["labels"].shape[1] :].index_select(1, kept)  # without virtual tokens
    logits = logits.float()
    targets = inputs["labels"].index_select(1, kept + 1)
    losses = token_losses(logits.flatten(0, 1), targets.flatten(), IGNORED)
    return losses.view_as(targets), logits, targets


def only_losses(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return labelled_losses(model, inputs)[0]


def kept_columns(inputs: dict[str, Any]) -> torch.Tensor:
    """[kept] the columns that predict a label; also for a model that computes its logits for all columns."""
    return inputs[KEPT if KEPT in inputs else PREDICTING]


def example_sums(model: nn.Module, inputs: dict[str, Any], examples: int) -> torch.Tensor:
    """[examples, 3]: each example's summed loss, labelled tokens and correctly predicted tokens."""
    losses, logits, targets = labelled_losses(model, inputs)
    example_ids = inputs[EXAMPLES].index_select(1, kept_columns(inputs) + 1)
    return _sum_by_example(example_ids, targets != IGNORED, losses, logits.argmax(-1) == targets, examples)


def fused_example_sums(output: Any, inputs: dict[str, Any], examples: int) -> torch.Tensor:
    """example_sums of trl's fused LM head, whose columns are those of the labels shifted by one."""
    example_ids = inputs[EXAMPLES][:, 1:]
    width = example_ids.shape[1]  # without virtual tokens
    per_token = (output.label_mask.bool(), -output.log_probs.float(), output.is_top1.bool())
    mask, losses, correct = (values[:, -width:] for values in per_token)
    return _sum_by_example(example_ids, mask, losses, correct, examples)


def _sum_by_example(
    example_ids: torch.Tensor, mask: torch.Tensor, losses: torch.Tensor, correct: torch.Tensor, examples: int
) -> torch.Tensor:
    dtype = torch.float32 if losses.device.type == "mps" else torch.float64
    values = torch.stack([losses.to(dtype), mask.to(dtype), correct.to(dtype)], dim=-1) * mask.unsqueeze(-1)
    sums = torch.zeros(examples, 3, dtype=dtype, device=losses.device)
    return sums.index_add_(0, example_ids.clamp(min=0).flatten(), values.flatten(0, 1))


@torch.no_grad()
def largest_gap(model: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest relative difference of an example's loss between two batches of the same examples, no dropout.

    Infinite for a model that can't take the batch's attention mask.
    """
    examples = int(second[EXAMPLES].max()) + 1
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        one, two = (
            example_sums(model, send_to_device(tensors(batch), device), examples)[:, 0] for batch in (first, second)
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):
        return float("inf")
    finally:
        model.train(was_training)
    return float(((one - two).abs() / two.abs().clamp(min=1e-6)).max())


def logits_bytes(config: Any, batch: dict[str, Any]) -> int:
    """Bytes of a batch's logits in fp32 at the positions that predict a label."""
    return len(batch["labels"]) * len(batch[KEPT]) * config.get_text_config().vocab_size * 4


def tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without its counts: its tensors and its segments."""
    return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) or k == SEGMENTS}
