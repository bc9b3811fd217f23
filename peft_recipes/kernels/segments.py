"""The parts of packed sequences: which positions attend to which, and the tensors that attention kernels take of it.

A packed sequence is a tree written depth first: what follows a prefix (or a prompt) is its branches, one after another.
So position k is visible to exactly the positions from k up to the end of the branches below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Part:
    """Positions [start, stop) of a packed sequence that attend to the earlier ranges `sees`, and to themselves."""

    start: int
    stop: int
    sees: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Segments:
    """The parts of each packed sequence of a batch, in order and without gaps up to the padding.

    kernel: the attention kernel that they are for (packed_attention.py). prepared: what it takes of them, by name:
    tensors, which move with `to` and `pin_memory` as the batch's own do, and numbers.
    """

    rows: list[list[Part]]
    length: int
    kernel: str = "mask"
    prepared: dict[str, torch.Tensor | int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.length

    def complete(self, row: list[Part]) -> list[Part]:
        """A row's parts with its padding, which attends to itself alone: without anything softmax would give NaN."""
        end = max((part.stop for part in row), default=0)
        return [*row, Part(end, self.length)] if end < self.length else row

    def visible_until(self) -> np.ndarray:
        """[rows, length] the position before which a position is visible: q attends to k where k <= q < until[k]."""
        until = np.zeros(self.shape, dtype=np.int32)
        for own, row in zip(until, self.rows, strict=True):
            for part in self.complete(row):
                own[part.start : part.stop] = part.stop
                for start, stop in part.sees:
                    np.maximum(own[start:stop], part.stop, out=own[start:stop])
        return until

    def positions(self) -> np.ndarray:
        """[rows, length] the number of earlier positions that each attends to, which windows are counted by."""
        positions = np.zeros(self.shape, dtype=np.int32)
        for own, row in zip(positions, self.rows, strict=True):
            for part in self.complete(row):
                seen = sum(stop - start for start, stop in part.sees)
                own[part.start : part.stop] = np.arange(seen, seen + part.stop - part.start)
        return positions

    def to(self, device: Any, non_blocking: bool = False) -> Segments:
        """The segments with their tensors on a device, as Accelerate moves a batch."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        """The segments with their tensors in pinned memory, as a DataLoader pins a batch."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Segments:
        moved = {name: move(x) if isinstance(x, torch.Tensor) else x for name, x in self.prepared.items()}
        return replace(self, prepared=moved)

    def mask(self, device: Any = None, window: int | None = None) -> torch.Tensor:
        """[rows, 1, length, length]: True where a position attends to another. Its memory grows with length squared.

        window: of sliding attention: the number of latest positions, its own included, that a position attends to.
        """
        if window is None and torch.device(device or "cpu").type == "cpu":
            return self._filled()
        until = self.tensor("until", self.visible_until, device)
        order = torch.arange(self.length, device=until.device)
        mask = (order[:, None] < until[:, None, None, :]).tril_()
        if window is not None:
            positions = self.tensor("positions", self.positions, device)
            mask &= positions[:, None, :, None] - positions[:, None, None, :] < window
        return mask

    def _filled(self) -> torch.Tensor:
        """The mask without windows, part by part: a third of the time on a CPU, and many small steps on a GPU."""
        mask = torch.zeros(len(self.rows), 1, self.length, self.length, dtype=torch.bool)
        for allowed, row in zip(mask[:, 0], self.rows, strict=True):
            for part in self.complete(row):
                allowed[part.start : part.stop, part.start : part.stop].fill_(True).tril_()
                for start, stop in part.sees:
                    allowed[part.start : part.stop, start:stop] = True
        return mask

    def tensor(self, name: str, make: Callable[[], np.ndarray], device: Any = None) -> torch.Tensor:
        """A prepared tensor, or one that is made now."""
        tensor = self.prepared[name] if name in self.prepared else torch.from_numpy(make())
        return tensor if device is None else tensor.to(device)


def for_mask(segments: Segments, positions: bool) -> dict[str, torch.Tensor | int]:
    """What `mask` takes, and layers that have none of their kernel. positions: whether any layer has a window."""
    prepared: dict[str, torch.Tensor | int] = {"until": torch.from_numpy(segments.visible_until())}
    return prepared | ({"positions": torch.from_numpy(segments.positions())} if positions else {})


def for_varlen(segments: Segments) -> dict[str, torch.Tensor | int]:
    """What attention over sequences of unequal length takes, in flash attention's words; of all rows together.

    Each part is a sequence of queries; its keys are the ranges that it sees and its own, in this order, so that the
    last query is level with the last key, as flash attention's causal mask has it. cu_seqlens_q, cu_seqlens_k
    [parts + 1]: where the sequences begin, int32. max_seqlen_q, max_seqlen_k: the longest. keys: [sum of the keys]
    their positions in the flattened batch; missing where they are the batch's own, i.e. where no part sees another.
    """
    queries, counts, ranges = [], [], []
    for row, parts in enumerate(segments.rows):
        offset = row * segments.length
        for part in segments.complete(parts):
            attended = [*part.sees, (part.start, part.stop)]
            queries.append(part.stop - part.start)
            counts.append(sum(stop - start for start, stop in attended))
            ranges += [np.arange(offset + start, offset + stop) for start, stop in attended]
    prepared: dict[str, torch.Tensor | int] = {
        "cu_seqlens_q": torch.tensor([0, *np.cumsum(queries).tolist()], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32),
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(counts),
    }
    if counts != queries:
        prepared["keys"] = torch.from_numpy(np.concatenate(ranges))
    return prepared
