"""A lane: rows that go through the model together. A row joins after its prompt is read and leaves when it ends.

The keys and values of all rows are in one cache, padded on the left to the longest row; the attention mask hides the
padding and each row counts its own positions, so a row has the logits that it has alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Tokens of a prompt that are read at a time: a long prompt does not keep the others from their next token.
CHUNK = 256
# Tokens of a prompt that the next one of the same adapter need not read again.
_LEAST_PREFIX, _MOST_PREFIX = 16, 512

Forward = Callable[[dict[str, Any], Sequence[str | None]], Any]


@dataclass(eq=False)
class Row:
    """One prompt and its answer. adapter: its name within the lane; None is the base.

    virtual: returns the virtual tokens of a prompt-learning adapter: embeddings [1, tokens, width] or a cache.
    cache: of this row alone, until it joins. length: tokens in the cache. token: the latest, not in the cache yet.
    """

    prompt: list[int]
    adapter: str | None = None
    virtual: Callable[[], Any] | None = None
    cache: Any = None
    read: int = 0
    length: int = 0
    token: int = -1


class Lane:
    """Rows on one base, with the forward pass that gives each row its adapter.

    exclusive: one row at a time, with the model's own kind of cache, for models whose cache can't be padded.
    """

    def __init__(self, base: nn.Module, forward: Forward, *, exclusive: bool = False):
        self.base, self.forward, self.exclusive = base, forward, exclusive
        self.rows: list[Row] = []
        self.device = next(base.parameters()).device
        self._accepts = set(inspect.signature(base.forward).parameters)
        # Mamba and its kind call it otherwise.
        self._cache_name = "cache_params" if "cache_params" in self._accepts else "past_key_values"
        self._cache: Any = None
        # Of each adapter's latest prompt: its tokens, and [1, heads, tokens, width] keys and values, a pair a layer.
        self._latest: dict[str | None, tuple[list[int], list[Any]]] = {}
        self._mask = torch.ones(0, 0, dtype=torch.long, device=self.device)  # [rows, positions]

    @torch.inference_mode()
    def read_prompt(self, row: Row) -> torch.Tensor | None:
        """Read the next chunk of a row's prompt. Returns [vocabulary] the logits after its last token, else None."""
        virtual = self._begin(row) if row.cache is None else None
        chunk = row.prompt[row.read :] if self.exclusive else row.prompt[row.read : row.read + CHUNK]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([chunk], device=self.device)}
        if virtual is not None:
            embedded = self.base.get_input_embeddings()(inputs["input_ids"])
            inputs = {"inputs_embeds": torch.cat([virtual.to(embedded.dtype), embedded], dim=1)}
        before, row.length = row.length, row.length + next(iter(inputs.values())).shape[1]
        positions = torch.arange(before, row.length, device=self.device)[None]
        mask = torch.ones(1, row.length, dtype=torch.long, device=self.device)
        output = self._pass(inputs, mask, positions, row.cache, [row.adapter])
        row.cache = getattr(output, self._cache_name)
        row.read += len(chunk)
        if row.read < len(row.prompt):
            return None
        self._remember(row)
        return output.logits[0, -1].float()

    def _begin(self, row: Row) -> torch.Tensor | None:
        """Make the row's cache. Returns the embeddings of an adapter's virtual tokens, which its prompt begins with."""
        from transformers import DynamicCache

        row.cache = None if self.exclusive else DynamicCache()  # None: the model makes its own kind
        virtual = None if row.virtual is None else row.virtual()
        if isinstance(virtual, torch.Tensor):
            return virtual
        states = [] if virtual is None else [(layer.keys, layer.values) for layer in virtual.layers]
        if virtual is None and not self.exclusive:
            row.read, states = self._known_prefix(row)
        if states:
            row.cache = DynamicCache()
            for number, (keys, values) in enumerate(states):
                row.cache.update(keys, values, number)
            row.length = row.cache.get_seq_length()
        return None

    def _known_prefix(self, row: Row) -> tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]:
        """What the prompt has in common with the latest one of its adapter, such as a template's system message.

        Returns the number of tokens and their keys and values, a pair a layer. At least one token is left to read.
        """
        tokens, states = self._latest.get(row.adapter, ([], []))
        most = min(len(tokens), len(row.prompt) - 1)
        same = next((i for i in range(most) if tokens[i] != row.prompt[i]), most)
        if same < _LEAST_PREFIX:
            return 0, []
        return same, [(keys[:, :, :same], values[:, :, :same]) for keys, values in states]

    def _remember(self, row: Row) -> None:
        if self.exclusive or row.virtual is not None:
            return
        kept = row.prompt[:_MOST_PREFIX]
        pairs = [(layer.keys, layer.values) for layer in row.cache.layers]
        if len(kept) < len(row.prompt):
            pairs = [tuple(states[:, :, : len(kept)].clone() for states in pair) for pair in pairs]
        self._latest[row.adapter] = (kept, pairs)

    def _pass(
        self, inputs: dict[str, Any], mask: torch.Tensor, positions: torch.Tensor, cache: Any, names: list[str | None]
    ) -> Any:
        options = {"position_ids": positions, "logits_to_keep": 1}
        if not self.exclusive:  # a single row has no padding, and Mamba takes a mask for the new tokens only
            options["attention_mask"] = mask
        options = {name: value for name, value in options.items() if name in self._accepts}
        return self.forward({**inputs, **options, self._cache_name: cache, "use_cache": True}, names)

    @torch.inference_mode()
    def join(self, row: Row) -> None:
        """Let a row whose prompt is read take part in the steps."""
        mask = torch.ones(1, row.length, dtype=torch.long, device=self.device)
        if self.rows:
            length = max(self._mask.shape[1], row.length)
            for layer, new in zip(self._cache.layers, row.cache.layers, strict=True):
                layer.keys = torch.cat([_padded(layer.keys, length), _padded(new.keys, length)])
                layer.values = torch.cat([_padded(layer.values, length), _padded(new.values, length)])
            self._mask = torch.cat([_padded_mask(self._mask, length), _padded_mask(mask, length)])
        else:
            self._cache, self._mask = row.cache, mask
        row.cache = None
        self.rows.append(row)

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Run each row's latest token. Returns [rows, vocabulary] the logits of the next."""
        tokens = torch.tensor([[row.token] for row in self.rows], device=self.device)
        positions = torch.tensor([[row.length] for row in self.rows], device=self.device)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        names = [row.adapter for row in self.rows]
        output = self._pass({"input_ids": tokens}, self._mask, positions, self._cache, names)
        self._cache = getattr(output, self._cache_name)
        for row in self.rows:
            row.length += 1
        return output.logits[:, -1].float()

    @torch.inference_mode()
    def leave(self, leaving: Sequence[Row]) -> None:
        """Remove rows, and the padding that only they needed."""
        kept = [i for i, row in enumerate(self.rows) if row not in leaving]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not self.rows:
            self._cache, self._mask = None, self._mask[:0, :0]
            return
        index = torch.tensor(kept, device=self.device)
        start = self._mask.shape[1] - max(row.length for row in self.rows)
        for layer in self._cache.layers:
            layer.keys = layer.keys[index, :, start:]
            layer.values = layer.values[index, :, start:]
        self._mask = self._mask[index, start:]

    def clear(self) -> None:
        """Remove all rows, after a failed pass too."""
        self.rows, self._cache, self._mask = [], None, self._mask[:0, :0]


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, heads, positions, width] padded on the left to `length` positions."""
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[2], 0))


def _padded_mask(mask: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))
