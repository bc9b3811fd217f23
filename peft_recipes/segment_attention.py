"""Attention over a shared-prefix row, example by example: the dense mask also pays for pairs of different examples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Segments:
    """How a batch's rows are made: the length of the prefix, and of each example behind it, row by row."""

    shared: int
    rows: list[list[int]]
    length: int

    def pay(self) -> bool:
        """Whether there are pairs of positions of different examples to save."""
        return any(len(row) > 1 for row in self.rows)


@contextlib.contextmanager
def by_segments(segments: Segments | None, mask: torch.Tensor | None) -> Iterator[None]:
    """Within it, transformers' sdpa attention over this batch runs example by example; any other is left as it is.

    On the CPU only: a GPU does one large call sooner than many small ones. Not for a step under gradient checkpointing,
    whose backward computes the attention again outside of this and would find the library's own.
    """
    if segments is None or mask is None or mask.device.type != "cpu" or not segments.pay():
        yield
        return
    pieces = [_pieces(segments, row, mask[number : number + 1]) for number, row in enumerate(segments.rows)]

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        ours = query.shape[0] == len(pieces) and query.shape[2] == key.shape[2] == segments.length
        if not ours or attention_mask is None or options.get("position_bias") is not None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        rows = []
        for number, row in enumerate(pieces):
            q, k, v = (tensor[number : number + 1] for tensor in (query, key, value))
            rows.append(torch.cat([_one(module, q, k, v, segments.shared, *piece, options) for piece in row], dim=1))
        return rows[0] if len(rows) == 1 else torch.cat(rows), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the library's own shows again


def _pieces(segments: Segments, lengths: list[int], mask: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """The places of a row's parts (prefix, examples, padding) and of each the mask [1, 1, part, prefix + part]."""
    shared, place = segments.shared, segments.shared
    parts = [slice(0, shared)] if shared else []
    for length in lengths:
        parts.append(slice(place, place + length))
        place += length
    if place < segments.length:
        parts.append(slice(place, segments.length))
    made = []
    for part in parts:
        own = mask[:, :, part, part]
        behind = part.start >= shared and shared
        made.append((part, torch.cat([mask[:, :, part, :shared], own], dim=-1) if behind else own))
    return made


def _one(
    module: Any, query: Any, key: Any, value: Any, shared: int, part: slice, mask: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """[1, part, heads, width]: what the positions of one part read of the prefix and of their own part."""
    k, v = key[:, :, part], value[:, :, part]
    if mask.shape[-1] > k.shape[2]:
        k, v = (torch.cat([whole[:, :, :shared], own], dim=2) for whole, own in ((key, k), (value, v)))
    return sdpa_attention_forward(module, query[:, :, part], k, v, mask, **options)[0]
