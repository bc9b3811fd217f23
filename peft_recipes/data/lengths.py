"""Tokens and labelled tokens of examples, before and after truncation, by the columns of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IGNORED = -100  # transformers' label of a position without a loss (packing.py has it with the collators)

Counts = dict[str, list[int]]  # "tokens" and "labelled", a number for each example


def token_counts(examples: Mapping[str, Sequence[Any]], task: str) -> Counts | None:
    """The tokens and labelled tokens of each example of a task; None where examples are not tokenised.

    The tokens are those that `max_length` limits: of a pair its longer sequence, of an encoder-decoder its longer side.
    `labelled` is empty where no token has a label (a class for the complete text).
    """
    return _OF_TASK[task](examples) if task in _OF_TASK else None


def _texts(examples: Mapping[str, Sequence[Any]]) -> Counts:
    return {"tokens": _sizes(examples["input_ids"]), "labelled": []}


def _labelled(examples: Mapping[str, Sequence[Any]]) -> Counts:
    return {
        "tokens": _sizes(examples["input_ids"]),
        "labelled": [sum(label != IGNORED for label in labels) for labels in examples["labels"]],
    }


def _two_sides(examples: Mapping[str, Sequence[Any]]) -> Counts:
    targets = _sizes(examples["labels"])
    return {"tokens": list(map(max, _sizes(examples["input_ids"]), targets)), "labelled": targets}


def _answers(examples: Mapping[str, Sequence[Any]]) -> Counts:
    """A prompt with one answer (kto), or with two (dpo)."""
    prompts = _sizes(examples["prompt_ids"])
    columns = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in _names(examples)]
    answers = list(zip(*(_sizes(examples[name]) for name in columns), strict=True))
    return {
        "tokens": [prompt + max(answer) for prompt, answer in zip(prompts, answers, strict=True)],
        "labelled": list(map(sum, answers)),
    }


def _scored_answers(examples: Mapping[str, Sequence[Any]]) -> Counts:
    return {"tokens": list(map(max, _sizes(examples["chosen_ids"]), _sizes(examples["rejected_ids"]))), "labelled": []}


def _sizes(rows: Sequence[Sequence[int]]) -> list[int]:
    return [len(row) for row in rows]


def _names(examples: Any) -> Sequence[str]:
    return getattr(examples, "column_names", None) or list(examples)


_OF_TASK = {
    "text-classification": _texts,
    "token-classification": _labelled,
    "sft": _labelled,
    "language-modeling": _labelled,
    "seq2seq": _two_sides,
    "dpo": _answers,
    "kto": _answers,
    "reward": _scored_answers,
}
