"""Attention over packed sequences by flash attention's kernels for sequences of unequal length.

Each part's keys are gathered: the prefix that it sees, then its own. Nothing is padded, no mask is made and nothing is
compiled. Where no part sees another this is padding-free packing.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from peft_recipes.kernels.segments import Segments


def attend(
    segments: Segments, query: Any, key: Any, value: Any, scale: float | None, window: int | None, implementation: str
) -> torch.Tensor:
    """Compute the attention output [rows, length, heads, head width] of queries [rows, heads, length, head width].

    segments: with what `for_varlen` prepares. implementation: the model's; "flash_attention_2" and the like use that
    package's kernel, others torch's own. The kernels take half precision: fp32 inputs are cast as autocast would.
    """
    shape, dtype = query.shape, query.dtype
    if query.dtype == torch.float32 or torch.is_autocast_enabled(query.device.type):
        dtype = _half(query.device.type)
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value))
    prepared = segments.prepared
    if (keys := prepared.get("keys")) is not None:
        k, v = k.index_select(0, keys), v.index_select(0, keys)
    bounds = [prepared[n] for n in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    output = kernel(implementation)(q, k, v, *bounds, scale=scale, window=window)
    return output.view(shape[0], shape[2], shape[1], value.shape[-1])


@functools.cache
def kernel(implementation: str) -> Callable[..., torch.Tensor]:
    """The kernel of an attention implementation; flash attention's where it is one of its, else torch's own."""
    if "flash" not in implementation:
        return _torch
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    functions, _ = lazy_import_flash_attention(implementation)
    return functools.partial(_flash, functions[1])


def available() -> bool:
    """Whether torch has a kernel of its own, as it does since 2.10."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _torch(q: Any, k: Any, v: Any, *bounds: Any, scale: float | None, window: int | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # (window, 0): the latest `window` keys before the query, and itself.
    sides = (-1 if window is None else window - 1, 0)
    return varlen_attn(q, k, v, *bounds, scale=scale, window_size=sides, enable_gqa=q.shape[1] != k.shape[1])


def _flash(function: Any, q: Any, k: Any, v: Any, *bounds: Any, scale: float | None, window: int | None) -> Any:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    options = {} if window is None else {"window_size": (window - 1, 0)}
    output = function(q, k, v, **dict(zip(names, bounds, strict=True)), softmax_scale=scale, causal=True, **options)
    return output[0] if isinstance(output, tuple) else output


def _half(device: str) -> torch.dtype:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.bfloat16
