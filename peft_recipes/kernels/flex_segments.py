"""Attention over packed sequences by FlexAttention: one compiled kernel that skips the blocks of unseen positions.

The BlockMask follows from the segments in closed form, on the CPU and in the collator, so that a step neither evaluates
the mask for all pairs of positions nor compiles anything for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.kernels.segments import Segments

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # positions of a block, as in torch
_GRAPHS = 64  # of the kernel at most: one or several rows, with or without gradients, each precision and window
_FIELDS = ("num_blocks", "indices")


def for_flex(segments: Segments, windows: Sequence[int | None] = (None,)) -> dict[str, torch.Tensor]:
    """What a BlockMask consists of, for each window of the model's layers (None: full attention)."""
    until = segments.tensor("until", segments.visible_until)
    positions = segments.tensor("positions", segments.positions)
    tensors = {"until": until}
    for window in windows:
        some, full = _blocks(until, positions, window)
        for kind, blocks in (("", some & ~full), ("full_", full)):
            for side, dense in (("kv", blocks), ("q", blocks.transpose(-2, -1))):
                for name, tensor in zip(_FIELDS, _ordered(dense), strict=True):
                    tensors[f"{kind}{side}_{name}{_of(window)}"] = tensor
        if window is not None:
            tensors["positions"] = positions
    return tensors


def is_prepared(segments: Segments, window: int | None) -> bool:
    """Whether the segments have what a BlockMask of this window consists of."""
    return f"kv_num_blocks{_of(window)}" in segments.prepared


def block_mask(segments: Segments, window: int | None, device: Any) -> BlockMask:
    """The BlockMask of segments that have what `for_flex` prepares for this window."""
    from torch.nn.attention.flex_attention import BlockMask

    names = [f"{kind}{side}_{name}" for kind in ("", "full_") for side in ("kv", "q") for name in _FIELDS]
    blocks = {name: segments.prepared[name + _of(window)].to(device) for name in names}
    visible = _visible(segments.prepared["until"].to(device))
    if window is not None:
        visible = _within(segments.prepared["until"].to(device), segments.prepared["positions"].to(device), window)
    lengths = (segments.length, segments.length)
    return BlockMask(seq_lengths=lengths, **blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)


def attend(
    mask: BlockMask, query: Any, key: Any, value: Any, scale: float | None, softcap: float | None = None
) -> torch.Tensor:
    """Compute the attention output [rows, length, heads, head width] of queries [rows, heads, length, head width]."""
    if torch.is_autocast_enabled(query.device.type):  # FlexAttention is not on autocast's list
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    if shares := groups > 1 and heads & (heads - 1) == 0:
        pass
    elif groups > 1:  # transformers copies the keys as well where the heads are no power of two
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    kernel = _flex() if query.device.type == "cpu" else _compiled()
    score = None if softcap is None else _capped(softcap)
    output = kernel(query, key, value, score_mod=score, block_mask=mask, scale=scale, enable_gqa=shares)
    return output.transpose(1, 2).contiguous()


def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled() -> Any:
    """FlexAttention, compiled once for all lengths: a kernel for each new length would take seconds."""
    import torch._dynamo

    # Beyond the limit dynamo runs the function uncompiled, which materialises all scores.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    return torch.compile(_flex(), dynamic=True)


def _visible(until: torch.Tensor) -> Any:
    def visible(row: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q < until[row, k])

    return visible


def _within(until: torch.Tensor, positions: torch.Tensor, window: int) -> Any:
    def visible(row: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q < until[row, k]) & (positions[row, q] - positions[row, k] < window)

    return visible


def _capped(softcap: float) -> Any:
    def capped(score: Any, row: Any, head: Any, q: Any, k: Any) -> Any:
        return softcap * torch.tanh(score / softcap)

    return capped


def _blocks(until: torch.Tensor, positions: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 1, blocks of queries, blocks of keys]: where any pair is visible, and where every pair is.

    With a window `some` can also hold a block without a visible pair, which costs its time alone.
    """
    length = until.shape[1]
    count = -(-length // BLOCK)
    first = torch.arange(count) * BLOCK
    last = first + BLOCK - 1
    highest, lowest = _extremes(until)
    later = first[:, None] > first
    # Of a pair of blocks, the first query is the likeliest to see a key, and the last one the least likely.
    some = torch.eye(count, dtype=torch.bool) | (later & (first[:, None] < highest[:, None]))
    full = later & (last[:, None] < lowest[:, None]) & (last < length)[:, None]
    if window is not None:
        high, low = _extremes(positions)
        some &= torch.eye(count, dtype=torch.bool) | (low[:, :, None] - high[:, None] < window)
        full &= high[:, :, None] - low[:, None] < window
    return some[:, None], full[:, None]


def _extremes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, blocks] the largest and the smallest value of each block."""
    rows, length = values.shape
    missing = -length % BLOCK
    padded = [torch.nn.functional.pad(values, (0, missing), value=fill) for fill in (-1, 2**31 - 1)]
    largest, smallest = (each.view(rows, -1, BLOCK) for each in padded)
    return largest.amax(-1), smallest.amin(-1)


def _ordered(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of blocks in each row of a dense block mask, and their indices before those of the others."""
    indices = dense.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), indices.to(torch.int32).contiguous()


def _of(window: int | None) -> str:
    return "" if window is None else f" within {window}"
