"""Attention over a shared row, part by part: the dense mask also pays for positions that can't see each other."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
    cuts = [_Cuts.of(segments, row, mask[number : number + 1]) for number, row in enumerate(segments.rows)]

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        ours = query.shape[0] == len(cuts) and query.shape[2] == key.shape[2] == segments.length
        others = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
        if not ours or others or attention_mask is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        rows = []
        for number, row in enumerate(cuts):
            q, k, v = (tensor[number : number + 1] for tensor in (query, key, value))
            rows.append(row.attend(q, k, v, options))
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the library's own shows again


@dataclass(frozen=True)
class _Cuts:
    """How a row is cut up. Each tensor is split once and put together in its backward pass once: slices would each
    bring a gradient of the whole row's size, filled with zeros.

    queries: the lengths of the parts, in order. keys: of the stretches between all their borders. sees: of each part,
    which of these stretches it looks at. masks: [1, 1, part, what it looks at].
    """

    queries: list[int]
    keys: list[int]
    sees: list[list[int]]
    masks: list[torch.Tensor]

    @classmethod
    def of(cls, segments: Segments, row: list[Part], mask: torch.Tensor) -> _Cuts:
        end = max((part.stop for part in row), default=0)
        parts = [*row, Part(end, segments.length)] if end < segments.length else row  # its padding is one, too
        looked_at = [[*part.sees, (part.start, part.stop)] for part in parts]
        borders = sorted({0, segments.length, *(place for found in looked_at for both in found for place in both)})
        stretches = list(itertools.pairwise(borders))
        return cls(
            [part.stop - part.start for part in parts],
            [b - a for a, b in stretches],
            [[i for a, b in found for i, (c, d) in enumerate(stretches) if a <= c and d <= b] for found in looked_at],
            [torch.cat([mask[:, :, part.start : part.stop, a:b] for a, b in found], dim=-1)
             for part, found in zip(parts, looked_at, strict=True)],
        )  # fmt: skip

    def attend(self, query: Any, key: Any, value: Any, options: dict[str, Any]) -> torch.Tensor:
        """[1, length, heads, width]: what each position read of what its part looks at."""
        options = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
        # Heads that share their keys are told so, not given a copy each.
        options["enable_gqa"] = query.shape[1] != key.shape[1]
        keys, values = key.split(self.keys, dim=2), value.split(self.keys, dim=2)
        read = []
        for q, seen, mask in zip(query.split(self.queries, dim=2), self.sees, self.masks, strict=True):
            k, v = (torch.cat([all_of[i] for i in seen], dim=2) if len(seen) > 1 else all_of[seen[0]]
                    for all_of in (keys, values))  # fmt: skip
            read.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
        return torch.cat(read, dim=2).transpose(1, 2)
