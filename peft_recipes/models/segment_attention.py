"""Attention over a shared row, part by part: the dense mask also pays for positions that can't see each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Part:
    """Positions of a row that attend alike: to the stretches `sees` before them, and to themselves."""

    start: int
    stop: int
    sees: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Segments:
    """How a batch's rows are made: of each its parts, in order and without a gap up to its padding."""

    rows: list[list[Part]]
    length: int

    @classmethod
    def behind(cls, shared: int, rows: list[list[int]], length: int) -> Segments:
        """Rows of examples of these lengths, one after another behind a prefix of `shared` positions."""
        made = []
        for lengths in rows:
            parts, place = [Part(0, shared)] if shared else [], shared
            for own in lengths:
                parts.append(Part(place, place + own, ((0, shared),) if shared else ()))
                place += own
            made.append(parts)
        return cls(made, length)

    def pay(self) -> bool:
        """Whether there are pairs of positions that can't see each other to save."""
        return any(part.start > sum(stop - start for start, stop in part.sees) for row in self.rows for part in row)


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
            rows.append(torch.cat([_one(module, q, k, v, *piece, options) for piece in row], dim=1))
        return rows[0] if len(rows) == 1 else torch.cat(rows), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the library's own shows again


def _pieces(segments: Segments, row: list[Part], mask: torch.Tensor) -> list[tuple[Part, torch.Tensor]]:
    """A row's parts, its padding among them, and of each the mask [1, 1, part, what it sees + part]."""
    end = max((part.stop for part in row), default=0)
    parts = [*row, Part(end, segments.length)] if end < segments.length else row
    return [
        (part, torch.cat([mask[:, :, part.start : part.stop, a:b] for a, b in _looked_at(part)], dim=-1))
        for part in parts
    ]


def _looked_at(part: Part) -> list[tuple[int, int]]:
    return [*part.sees, (part.start, part.stop)]


def _one(
    module: Any, query: Any, key: Any, value: Any, part: Part, mask: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """[1, part, heads, width]: what the positions of one part read of what they see and of their own part."""
    k, v = (torch.cat([whole[:, :, a:b] for a, b in _looked_at(part)], dim=2) if part.sees
            else whole[:, :, part.start : part.stop] for whole in (key, value))  # fmt: skip
    return sdpa_attention_forward(module, query[:, :, part.start : part.stop], k, v, mask, **options)[0]
