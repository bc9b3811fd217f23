"""Prepared: the data of a recipe as its trainer takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Prepared:
    """A recipe's data as its trainer takes it.

    splits: "train", "validation", "test", the recipe's further evaluation sets, and "pretrain" where there is one.
    rows: how many examples each has. ids: each example's own, in the order of the split. folder: where a comparison
    keeps it for all its runs.
    """

    splits: dict[str, Any]
    ids: dict[str, list[str]]
    fingerprint: str
    processor: Any = None
    labels: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, str]] | None = None
    folder: Path | None = None

    @property
    def rows(self) -> dict[str, int]:
        return {split: len(ids) for split, ids in self.ids.items() if split != "pretrain"}
