"""Join the batches of several models into one: rows below each other, padded to a common length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from peft_recipes.kernels import packed_attention
from peft_recipes.kernels.segments import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Inputs = Mapping[str, Any]  # keyword arguments of a model's forward


def kind(inputs: Inputs) -> tuple[Any, ...]:
    """What two batches must have in common to be joined: which arguments there are, and what sort of mask."""
    return tuple((name, _kind(value)) for name, value in sorted(inputs.items()) if value is not None)


def joined(batches: Sequence[Inputs], config: PreTrainedConfig) -> dict[str, Any]:
    """Join batches of one kind. config: of the model. Raises NotImplementedError for an argument of another shape.

    Padding is in the right columns, and real positions do not attend to it: 0 in a 2-D mask, a position of its own in
    a 4-D one.
    """
    length = max(batch["input_ids"].shape[1] for batch in batches)
    return {
        name: _joined([batch[name] for batch in batches], name, length, config)
        for name, value in batches[0].items()
        if value is not None
    }


def padded(rows: torch.Tensor, length: int, value: float = 0) -> torch.Tensor:
    """Pad [rows, columns, ...] to `length` columns."""
    missing = length - rows.shape[1]
    return rows if not missing else F.pad(rows, [0, 0] * (rows.dim() - 2) + [0, missing], value=value)


def _kind(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    packed = getattr(value, "packed", None)
    return value.dim(), value.dtype, packed and packed.segments.kernel


def _joined(values: Sequence[Any], name: str, length: int, config: PreTrainedConfig) -> Any:
    first = values[0]
    if not isinstance(first, torch.Tensor):
        return first
    if hasattr(first, "packed"):
        return _joined_segments([value.packed.segments for value in values], length, config, first.device)
    if first.dim() == 2:
        return torch.cat([padded(value, length) for value in values])
    if first.dim() == 4 and first.shape[2] == first.shape[3]:
        return torch.cat([_padded_mask(value, length) for value in values])
    raise NotImplementedError(f"'{name}' of {first.dim()} dimensions can't be joined with other batches'.")


def _joined_segments(each: Sequence[Segments], length: int, config: PreTrainedConfig, device: Any) -> torch.Tensor:
    prepare = packed_attention.Preparation(each[0].kernel, packed_attention.windows_of(config))
    segments = Segments([row for segments in each for row in segments.rows], length)
    return packed_attention.attention_mask(prepare(segments), config, device)


def _padded_mask(mask: torch.Tensor, length: int) -> torch.Tensor:
    """Pad a mask [rows, 1, own length, own length]; a padded position attends to itself alone."""
    missing = length - mask.shape[2]
    if not missing:
        return mask
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask = F.pad(mask, [0, missing, 0, missing], value=hidden)
    own = torch.arange(length - missing, length, device=mask.device)
    mask[:, :, own, own] = True if mask.dtype == torch.bool else 0.0
    return mask
