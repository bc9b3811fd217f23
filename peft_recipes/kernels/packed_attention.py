"""Attention over packed batches inside transformers' models: one of four kernels, chosen per run.

A model is given a placeholder as its attention mask, which knows the segments and the kernel; the attention function of
the model's implementation runs the kernel where it meets one, and is unchanged for every other mask. What a layer needs
is on the placeholder, so attention that gradient checkpointing recomputes is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_recipes.kernels import flex_segments, segment_attention, varlen_attention
from peft_recipes.kernels.segments import Segments, for_mask, for_varlen

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# By name: part by part (the CPU's), FlexAttention, flash attention's varlen kernels, and a dense mask.
PARTS, FLEX, VARLEN, MASK = KERNELS = ("parts", "flex", "varlen", "mask")
_DENSE_ONLY = ("position_bias", "cache", "s_aux")  # options of a layer that no kernel here takes
_installed: set[str] = set()


@dataclass(frozen=True)
class Preparation:
    """Prepare segments for a kernel, in the collator. windows: of the model's layers; None is full attention."""

    kernel: str
    windows: tuple[int | None, ...] = (None,)

    def __call__(self, segments: Segments) -> Segments:
        windows = tuple(dict.fromkeys(_reached(window, segments) for window in self.windows))
        prepared: dict[str, torch.Tensor | int] = {}
        if self.kernel != PARTS:
            prepared = for_mask(segments, positions=windows != (None,))
        if self.kernel == FLEX:
            prepared |= flex_segments.for_flex(segments, windows)
        elif self.kernel == VARLEN:
            prepared |= for_varlen(segments)
        return replace(segments, kernel=self.kernel, prepared=prepared)


@dataclass
class _Packed:
    """A batch's segments for the layers of a forward pass, with what they have made of it by window."""

    segments: Segments
    implementation: str
    made: dict[tuple[str, int | None], Any] = field(default_factory=dict)

    def is_of(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether queries and keys [rows, heads, length, head width] are those of this batch."""
        return (query.shape[0], query.shape[2]) == self.segments.shape and query.shape[2] == key.shape[2]

    def attend(self, module: Any, query: Any, key: Any, value: Any, options: dict[str, Any]) -> torch.Tensor:
        """Compute the attention output [rows, length, heads, head width]."""
        window, softcap = _reached(options.get("sliding_window"), self.segments), options.get("softcap")
        dropout, scale = options.get("dropout") or 0.0, options.get("scaling")
        kernel, device = self._kernel_for(options, dropout, softcap, window), query.device
        if kernel == PARTS:
            splits = self._once(kernel, window, lambda: segment_attention.splits_of(self.segments, window, device))
            return segment_attention.attend(splits, query, key, value, dropout, scale)
        if kernel == FLEX:
            mask = self._once(kernel, window, lambda: flex_segments.block_mask(self.segments, window, device))
            return flex_segments.attend(mask, query, key, value, scale, softcap)
        if kernel == VARLEN:
            return varlen_attention.attend(self.segments, query, key, value, scale, window, self.implementation)
        mask = self._once(kernel, window, lambda: self.segments.mask(device, window))
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]

    def _kernel_for(self, options: dict[str, Any], dropout: float, softcap: float | None, window: int | None) -> str:
        """The batch's kernel; the dense mask for a layer whose options it does not take."""
        kernel = self.segments.kernel
        unknown = any(options.get(name) is not None for name in _DENSE_ONLY)
        unprepared = kernel == FLEX and not flex_segments.is_prepared(self.segments, window)
        lacking = (softcap and kernel != FLEX) or (dropout and kernel != PARTS)
        return MASK if unknown or unprepared or lacking else kernel

    def _once(self, kernel: str, window: int | None, make: Callable[[], Any]) -> Any:
        if (kernel, window) not in self.made:
            self.made[kernel, window] = make()
        return self.made[kernel, window]


def attention_mask(segments: Segments, config: PreTrainedConfig, device: Any) -> torch.Tensor:
    """What a model takes as its attention_mask [rows, 1, length, length]: a placeholder of no size, or the dense mask.

    The placeholder lets no position attend to any other, so a model that does not hand it to the attention function of
    its implementation gives outputs that no comparison of losses can take for right. A model with an attention of its
    own takes the dense mask, which has no room for windows.
    """
    implementation = config._attn_implementation
    if segments.kernel == MASK and not any(_reached(window, segments) for window in windows_of(config)):
        return segments.mask(device)
    install(implementation)
    placeholder = torch.zeros(1, dtype=torch.bool, device=device).expand(len(segments.rows), 1, *[segments.length] * 2)
    placeholder.packed = _Packed(segments.to(device), implementation)
    return placeholder


def compilable_mask(segments: Segments, config: PreTrainedConfig, device: Any) -> Any:
    """An attention mask for a compiled model, which takes no placeholder: a BlockMask or a dense mask.

    Either is one for all layers. Raises RuntimeError for a model whose layers look back differently.
    """
    if any(_reached(window, segments) for window in windows_of(config)):
        raise RuntimeError(
            "A compiled model with sliding windows can't run packed batches: its layers have one mask. Set "
            "batches=padded, or leave torch_compile out."
        )
    if segments.kernel != FLEX:
        return segments.mask(device)
    install(config._attn_implementation)
    return flex_segments.block_mask(segments, None, device)


def additive_mask(segments: Segments, device: Any) -> torch.Tensor:
    """The mask [rows, 1, length, length] as the numbers that eager attention adds to its scores."""
    mask = segments.mask(device)
    return torch.zeros(mask.shape, device=device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def _reached(window: int | None, segments: Segments) -> int | None:
    """A layer's window, where a sequence can be longer."""
    return window if window and window < segments.length else None


def windows_of(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The windows of a model's layers, None for full attention."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,)
    if kinds is None:
        return (window,)
    return tuple(dict.fromkeys(window if kind == "sliding_attention" else None for kind in kinds))


def kernels_for(config: PreTrainedConfig, device: str, half: bool = False) -> Sequence[str]:
    """The kernels that may run this model's packed batches there, the likeliest to be fastest first.

    device: "meta" counts as the CPU: a plan is made without the device. half: whether the run computes in half
    precision, which flash attention's kernels take alone.
    """
    implementation = config._attn_implementation or "eager"
    if implementation == "eager":
        return (MASK,)
    drops = any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop", "attn_dropout"))
    if implementation == "flex_attention":
        return () if drops else (FLEX,)
    if "flash" in implementation:
        return (VARLEN,) if half and not drops else ()
    if implementation != "sdpa":
        return ()
    if device in ("cpu", "meta"):
        return (PARTS, MASK)
    if device != "cuda" or drops:
        return (MASK,)
    return (VARLEN, FLEX, MASK) if half and varlen_attention.available() else (FLEX, MASK)


def install(implementation: str) -> None:
    """Let the attention function of an implementation run the kernels of packed batches."""
    if implementation in _installed:
        return
    original = ALL_ATTENTION_FUNCTIONS[implementation]

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, Any]:
        if isinstance(attention_mask, torch.Tensor):
            packed = getattr(attention_mask, "packed", None)
            if packed is not None and packed.is_of(query, key):
                return packed.attend(module, query, key, value, options), None
        elif attention_mask is not None and implementation != "flex_attention":  # a compiled model's BlockMask
            scale, softcap = options.get("scaling"), options.get("softcap")
            return flex_segments.attend(attention_mask, query, key, value, scale, softcap), None
        return original(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS[implementation] = attention
    _installed.add(implementation)
