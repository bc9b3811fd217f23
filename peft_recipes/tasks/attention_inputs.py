"""What a model's forward takes of a batch: its attention mask, whatever kernel runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel, has_compiled_regions, is_compiled_module

from peft_recipes.data.packing import COUNTS, EXAMPLES, KEPT, PREDICTING, SEGMENTS
from peft_recipes.kernels import packed_attention as attention

if TYPE_CHECKING:
    import torch.nn as nn


def attention_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The attention mask that a model's forward takes of a packed batch; nothing of a padded one, which has its own."""
    segments = inputs.get(SEGMENTS)
    if segments is None:
        return {}
    device = inputs["input_ids"].device
    config = extract_model_from_parallel(model, keep_torch_compile=False).config.get_text_config()
    if config._attn_implementation == "eager":
        return {"attention_mask": attention.additive_mask(segments, device)}
    if is_compiled_module(model) or has_compiled_regions(model):
        # A compiled model would be recompiled for the segments of each step.
        return {"attention_mask": attention.compilable_mask(segments, config, device)}
    return {"attention_mask": attention.attention_mask(segments, config, device)}


def plain_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that trl's own code takes."""
    plain = {k: v for k, v in inputs.items() if k not in (COUNTS, EXAMPLES, KEPT, PREDICTING, SEGMENTS)}
    return plain | attention_inputs(model, inputs)
