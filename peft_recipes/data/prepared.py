"""Prepared: a recipe's dataset, tokenised and split, as its trainer takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Prepared:
    """A recipe's dataset, as its trainer takes it.

    splits: "train", "validation", "test", the recipe's further evaluation sets, and "pretrain" where there is one.
    ids: the example ids of each split, in its order. folder: where a comparison stores the data for its runs.
    prompts: by split, the examples whose answers are scored: "index" in the split, "id", "prompt" as text and as
    "prompt_ids", "reference", "reference_tokens" (with its end token) and "row", the columns of the data.
    stream: where the training examples are streamed, their `data.streaming.Stream`; then splits["train"] is a sample.
    problem_type: of a text classifier, as the data has it (one of `recipe.dataset.PROBLEM_TYPES`).
    whole: by split, the tokens and labelled tokens of each example before truncation (`lengths.token_counts`).
    """

    splits: dict[str, Any]
    ids: dict[str, list[str]]
    fingerprint: str
    processor: Any = None
    labels: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, str]] | None = None
    prompts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problem_type: str | None = None
    whole: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    folder: Path | None = None
    stream: Any = None

    def train_rows(self, seed: int) -> Any:
        """What the trainer takes as training examples. seed: of a stream's order; Trainer orders all others."""
        return self.splits["train"] if self.stream is None else self.stream.ordered(seed)

    @property
    def rows(self) -> dict[str, int]:
        """The number of examples in each split; a stream has none of train."""
        left_out = ("pretrain", *(["train"] if self.stream is not None else []))
        return {split: len(ids) for split, ids in self.ids.items() if split not in left_out}

    def interval_problems(self) -> list[str]:
        """Return one line for each evaluation set with too few examples for the interval of a difference."""
        return [
            f"The split '{split}' has {count} example: the interval of a difference needs at least two. "
            + ("Raise dataset.test" if split == "test" else f"Raise evaluate_also.{split}.test")
            + ", or name a larger set; `peft-recipes train` works with one."
            for split, count in self.rows.items()
            if split not in ("train", "validation") and count < 2
        ]
