"""Attention over a packed sequence part by part: a dense mask also computes the pairs that it masks out."""

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
    """Positions [start, stop) of a packed sequence that attend to the earlier ranges `sees`, and to themselves."""

    start: int
    stop: int
    sees: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Segments:
    """The parts of each packed sequence of a batch, in order and without gaps up to the padding."""

    rows: list[list[Part]]
    length: int

    def complete(self, row: list[Part]) -> list[Part]:
        """A row's parts with its padding, which attends to itself alone: without anything softmax would give NaN."""
        end = max((part.stop for part in row), default=0)
        return [*row, Part(end, self.length)] if end < self.length else row

    def mask(self) -> torch.Tensor:
        """[rows, 1, length, length]: True where a position attends to another. Its memory grows with length squared."""
        mask = torch.zeros(len(self.rows), 1, self.length, self.length, dtype=torch.bool)
        for allowed, row in zip(mask[:, 0], self.rows, strict=True):
            for part in self.complete(row):
                allowed[part.start : part.stop, part.start : part.stop].fill_(True).tril_()
                for start, stop in part.sees:
                    allowed[part.start : part.stop, start:stop] = True
        return mask

    def placeholder(self) -> torch.Tensor:
        """A tensor of the mask's shape and of no size, for a model that runs under `by_segments`.

        It lets no position attend to any other, so a model that does not use it as transformers' sdpa attention does
        gives outputs that no comparison of losses can take for right.
        """
        return torch.zeros(1, dtype=torch.bool).expand(len(self.rows), 1, self.length, self.length)


@contextlib.contextmanager
def by_segments(segments: Segments | None) -> Iterator[None]:
    """Run transformers' sdpa attention over this batch part by part; other calls are unchanged. None changes nothing.

    The model's attention_mask is then the segments' placeholder: the mask itself is only made for layers with options
    that the parts don't support. Only on the CPU: on a GPU one large call is faster than many small ones. Not for
    gradient checkpointing, whose backward pass would recompute the attention outside of this context.
    """
    if segments is None:
        yield
        return
    splits = [_Splits.of(segments.complete(row), segments.length) for row in segments.rows]
    dense: list[torch.Tensor] = []

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        is_batch = query.shape[0] == len(splits) and query.shape[2] == key.shape[2] == segments.length
        if not is_batch or attention_mask is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if any(options.get(name) is not None for name in ("position_bias", "softcap", "cache")):
            if not dense:
                dense.append(segments.mask())
            return sdpa_attention_forward(module, query, key, value, dense[0], **options)
        rows = []
        for i, split in enumerate(splits):
            q, k, v = (tensor[i : i + 1] for tensor in (query, key, value))
            rows.append(split.attend(q, k, v, options))
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # uncovers the library's own


@dataclass(frozen=True)
class _Splits:
    """How a sequence is split, once per tensor: a slice's gradient would be a zero-filled tensor of the full size.

    queries: lengths of the parts, in order. keys: lengths of the ranges between the borders of all parts. sees: for
    each part, the indices of the ranges it attends to. masks: [1, 1, part, attended positions] for each part.
    """

    queries: list[int]
    keys: list[int]
    sees: list[list[int]]
    masks: list[torch.Tensor]

    @classmethod
    def of(cls, parts: list[Part], length: int) -> _Splits:
        attended = [[*part.sees, (part.start, part.stop)] for part in parts]
        borders = sorted({0, length, *(border for seen in attended for pair in seen for border in pair)})
        ranges = list(itertools.pairwise(borders))
        masks = []
        for part in parts:
            own = part.stop - part.start
            visible = torch.ones(1, 1, own, sum(stop - start for start, stop in part.sees) + own, dtype=torch.bool)
            visible[..., -own:].tril_()
            masks.append(visible)
        return cls(
            queries=[part.stop - part.start for part in parts],
            keys=[b - a for a, b in ranges],
            sees=[[i for a, b in seen for i, (c, d) in enumerate(ranges) if a <= c and d <= b] for seen in attended],
            masks=masks,
        )

    def attend(self, query: Any, key: Any, value: Any, options: dict[str, Any]) -> torch.Tensor:
        """Compute the attention output [1, length, heads, head width]."""
        options = {
            "dropout_p": options.get("dropout", 0.0),
            "scale": options.get("scaling"),
            "enable_gqa": query.shape[1] != key.shape[1],  # instead of copying the keys that heads share
        }
        keys, values = key.split(self.keys, dim=2), value.split(self.keys, dim=2)
        outputs = []
        for q, seen, mask in zip(query.split(self.queries, dim=2), self.sees, self.masks, strict=True):
            k, v = (_concatenated([ranges[i] for i in seen]) for ranges in (keys, values))
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _concatenated(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors, dim=2) if len(tensors) > 1 else tensors[0]
