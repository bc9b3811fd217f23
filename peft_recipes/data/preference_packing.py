"""Exact shared batches of preference pairs: a pair's prompt once for both answers, all pairs' common beginning once.

A row is a tree laid out flat: the beginning that all prompts share, then of each pair the rest of its prompt, the
chosen answer and the rejected one. An answer sees the beginning, its pair's prompt and itself, so each of its tokens
sees exactly what it sees in a padded batch, and has the same log-probability and gradient (packing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_recipes.data.packing import (
    COMPLETIONS,
    COUNTS,
    EXAMPLES,
    IGNORED,
    KEPT,
    REFERENCES,
    SEGMENTS,
    Counts,
    PaddedCollator,
    SharedPrefixCollator,
    predicting_columns,
)
from peft_recipes.kernels.segment_attention import Part, Segments

PROMPT, CHOSEN, REJECTED = "prompt_ids", "chosen_ids", "rejected_ids"  # a pair's columns, as trl names them
_PADDING, _BEGINNING = -2, -1  # instead of a pair's place, of positions that belong to none


@dataclass
class SharedPromptCollator(SharedPrefixCollator):
    """Pairs {"prompt_ids", "chosen_ids", "rejected_ids"} to rows in which every prompt stands once.

    Returns what SharedPrefixCollator returns, where answer i of the batch's n pairs is example i if chosen and n + i if
    rejected, and completion_mask, with the reference's log-probabilities where the pairs have them.
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # The last token of a prompt predicts the first of an answer, so each answer has its own copy of it.
        stems = [list(pair[PROMPT][:-1]) for pair in examples]
        answers = [[_after(pair, key, len(stem)) for key in (CHOSEN, REJECTED)]
                   for pair, stem in zip(examples, stems, strict=True)]  # fmt: skip
        shared = _common(stems) if len(stems) > 1 else 0
        own = [len(stem) - shared + sum(len(ids) for ids, _ in both)
               for stem, both in zip(stems, answers, strict=True)]  # fmt: skip
        rows = self._rows(own, shared, [len(pair[CHOSEN]) + len(pair[REJECTED]) for pair in examples])
        length = max(shared + sum(own[pair] for pair in row) for row in rows)
        made = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "position_ids": torch.zeros((len(rows), length), dtype=torch.long),
            "labels": torch.full((len(rows), length), IGNORED),
            EXAMPLES: torch.full((len(rows), length), -1),
        }
        pairs, branches = torch.full((len(rows), length), _PADDING), torch.zeros((len(rows), length), dtype=torch.long)
        parts: list[list[Part]] = []
        for number, row in enumerate(rows):
            made["input_ids"][number, :shared] = torch.tensor(stems[row[0]][:shared], dtype=torch.long)
            made["position_ids"][number, :shared] = torch.arange(shared)
            pairs[number, :shared] = _BEGINNING
            parts.append([Part(0, shared)] if shared else [])
            place = shared
            for pair in row:
                stem, start = stems[pair], place
                stretches = [(stem[shared:], None, shared), *((*answer, len(stem)) for answer in answers[pair])]
                for branch, (ids, labels, position) in enumerate(stretches):
                    here = slice(place, place + len(ids))
                    made["input_ids"][number, here] = torch.tensor(ids, dtype=torch.long)
                    made["position_ids"][number, here] = torch.arange(position, position + len(ids))
                    pairs[number, here], branches[number, here] = pair, branch
                    if labels is not None:
                        made["labels"][number, here] = torch.tensor(labels)
                        made[EXAMPLES][number, here] = pair + (branch - 1) * len(examples)
                    place = here.stop
                parts[-1] += _parts(shared, start, len(stem) - shared, [len(ids) for ids, _ in answers[pair]])
        made["attention_mask"] = self._tree_mask(pairs, branches)
        if self.by_segments:
            made[SEGMENTS] = Segments(parts, length)
        made[KEPT] = predicting_columns(made["labels"])
        made[COUNTS] = Counts(_tokens(examples), pairs.numel(), int((pairs == _PADDING).sum()), len(examples))
        return {**made, **_of_pairs(examples)}

    def _tree_mask(self, pairs: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
        """[rows, 1, length, length]: True (or 0) where a position may look: up its own branch of the tree."""
        of_query, of_key = pairs[:, :, None], pairs[:, None, :]
        upwards = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
        allowed = (((of_query == of_key) & upwards) | ((of_key == _BEGINNING) & (of_query >= 0))).tril_()
        return self._as_attention_takes_it(allowed)


@dataclass
class PaddedPairsCollator(PaddedCollator):
    """Pairs to a padded batch of 2n sequences, the chosen ones first: what the shared rows are held against."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sequences = [
            {"input_ids": [*pair[PROMPT], *pair[key]], "labels": [*[IGNORED] * len(pair[PROMPT]), *pair[key]]}
            for key in (CHOSEN, REJECTED)
            for pair in examples
        ]
        made = super().__call__(sequences)
        counts: Counts = made[COUNTS]
        made[COUNTS] = Counts(counts.tokens, counts.computed, counts.padding, len(examples))
        return {**made, **_of_pairs(examples)}


def _after(pair: dict[str, Any], key: str, stem: int) -> tuple[list[int], list[int]]:
    """What of one answer stands behind its pair's stem: the prompt's last token and the answer, and the labels."""
    prompt, answer = list(pair[PROMPT][stem:]), list(pair[key])
    labels = [IGNORED] * len(prompt) + answer
    if not prompt:
        labels[0] = IGNORED  # nothing comes before it that could predict it
    return prompt + answer, labels


def _common(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    shortest, first = min(map(len, sequences)), sequences[0]
    return next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)


def _parts(shared: int, start: int, stem: int, answers: list[int]) -> list[Part]:
    """The parts of one pair: its prompt with the chosen answer behind it, which read alike, and the rejected answer."""
    beginning = ((0, shared),) if shared else ()
    middle, end = start + stem + answers[0], start + stem + sum(answers)
    prompt = ((start, start + stem),) if stem else ()
    return [Part(start, middle, beginning), Part(middle, end, beginning + prompt)]


def _of_pairs(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """completion_mask [2 pairs, longest sequence], and the reference's log-probabilities where the pairs have them."""
    lengths = [(len(pair[PROMPT]), len(pair[key])) for key in (CHOSEN, REJECTED) for pair in examples]
    mask = torch.zeros((len(lengths), max(sum(both) for both in lengths)), dtype=torch.long)
    for row, (prompt, answer) in enumerate(lengths):
        mask[row, prompt : prompt + answer] = 1
    known = {key: torch.tensor([pair[key] for pair in examples]) for key in REFERENCES if key in examples[0]}
    return {COMPLETIONS: mask, **known}


def _tokens(examples: Sequence[dict[str, Any]]) -> int:
    return sum(2 * len(pair[PROMPT]) + len(pair[CHOSEN]) + len(pair[REJECTED]) for pair in examples)
