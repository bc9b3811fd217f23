"""Attention over a packed sequence part by part: a dense mask also computes the pairs that it masks out.

For the CPU: on a GPU one large call is faster than many small ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from peft_recipes.kernels.segments import Part, Segments


@dataclass(frozen=True)
class Splits:
    """How a sequence is split, once per tensor: a slice's gradient would be a zero-filled tensor of the full size.

    queries: lengths of the parts, in order. keys: lengths of the ranges between the borders of all parts. sees: for
    each part, the indices of the ranges it attends to. masks: [1, 1, part, attended positions] for each part.
    """

    queries: list[int]
    keys: list[int]
    sees: list[list[int]]
    masks: list[torch.Tensor]

    @classmethod
    def of(cls, parts: list[Part], length: int, window: int | None = None, device: Any = None) -> Splits:
        """window: the latest positions that a position attends to, its own included; None: all."""
        attended = [[*part.sees, (part.start, part.stop)] for part in parts]
        borders = sorted({0, length, *(border for seen in attended for pair in seen for border in pair)})
        ranges = list(itertools.pairwise(borders))
        masks = []
        for part in parts:
            own, seen = part.stop - part.start, sum(stop - start for start, stop in part.sees)
            visible = torch.ones(1, 1, own, seen + own, dtype=torch.bool, device=device).tril_(seen)
            masks.append(visible if window is None else visible.triu_(seen - window + 1))
        return cls(
            queries=[part.stop - part.start for part in parts],
            keys=[b - a for a, b in ranges],
            sees=[[i for a, b in seen for i, (c, d) in enumerate(ranges) if a <= c and d <= b] for seen in attended],
            masks=masks,
        )

    def attend(self, query: Any, key: Any, value: Any, dropout: float, scale: float | None) -> torch.Tensor:
        """Compute the attention output [1, length, heads, head width]."""
        enable_gqa = query.shape[1] != key.shape[1]  # instead of copying the keys that heads share
        options = {"dropout_p": dropout, "scale": scale, "enable_gqa": enable_gqa}
        keys, values = key.split(self.keys, dim=2), value.split(self.keys, dim=2)
        outputs = []
        for q, seen, mask in zip(query.split(self.queries, dim=2), self.sees, self.masks, strict=True):
            k, v = (_concatenated([ranges[i] for i in seen]) for ranges in (keys, values))
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def splits_of(segments: Segments, window: int | None, device: Any) -> list[Splits]:
    """The splits of each row."""
    return [Splits.of(segments.complete(row), segments.length, window, device) for row in segments.rows]


def attend(splits: list[Splits], query: Any, key: Any, value: Any, dropout: float, scale: float | None) -> torch.Tensor:
    """Compute the attention output [rows, length, heads, head width] of queries [rows, heads, length, head width]."""
    rows = [
        split.attend(*(tensor[i : i + 1] for tensor in (query, key, value)), dropout, scale)
        for i, split in enumerate(splits)
    ]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).contiguous()


def _concatenated(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors, dim=2) if len(tensors) > 1 else tensors[0]
