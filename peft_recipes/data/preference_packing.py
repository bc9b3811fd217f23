"""Exact packing of preference pairs: each prompt once for both answers, behind the common prefix of all prompts.

A packed sequence is a flattened tree: the common prefix, then for each pair the rest of its prompt, its chosen and its
rejected answer. An answer sees the prefix, its own prompt and itself, so its tokens have the same log-probabilities and
gradients as in a padded batch (packing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from peft_recipes.data.packing import (
    COMPLETIONS,
    COUNTS,
    IGNORED,
    REFERENCES,
    PaddedCollator,
    Piece,
    SharedPrefixCollator,
    common_prefix,
)

PROMPT, CHOSEN, REJECTED = "prompt_ids", "chosen_ids", "rejected_ids"  # a pair's columns, as in trl


@dataclass
class SharedPromptCollator(SharedPrefixCollator):
    """Collate pairs {"prompt_ids", "chosen_ids", "rejected_ids"} to sequences that hold every prompt once.

    Returns what SharedPrefixCollator returns, with completion_mask, and the reference's log-probabilities where the
    pairs have them. Of n pairs, the chosen answer of pair i is example i and its rejected answer example n + i.
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # The last token of a prompt predicts the first of an answer, so each answer has its own copy of it.
        prompts = [list(pair[PROMPT][:-1]) for pair in examples]
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        pairs = [
            [
                Piece(prompt[shared:], [], shared),
                _answer(pair, CHOSEN, branch=1, example=i),
                _answer(pair, REJECTED, branch=2, example=len(examples) + i),
            ]
            for i, (pair, prompt) in enumerate(zip(examples, prompts, strict=True))
        ]
        lengths = [sum(len(piece.ids) for piece in pieces) for pieces in pairs]
        packed = self._assign(lengths, shared, [len(pair[CHOSEN]) + len(pair[REJECTED]) for pair in examples])
        sequences = [[piece for i in indices for piece in pairs[i]] for indices in packed]
        tokens = sum(2 * len(pair[PROMPT]) + len(pair[CHOSEN]) + len(pair[REJECTED]) for pair in examples)
        batch = self._pack(prompts[0][:shared], sequences, tokens, len(examples))
        return {**batch, **_completions(examples)}


@dataclass
class PaddedPairsCollator(PaddedCollator):
    """Collate pairs to a padded batch of 2n sequences, the chosen ones first."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sequences = [
            {"input_ids": [*pair[PROMPT], *pair[key]], "labels": [*[IGNORED] * len(pair[PROMPT]), *pair[key]]}
            for key in (CHOSEN, REJECTED)
            for pair in examples
        ]
        batch = super().__call__(sequences)
        return {**batch, COUNTS: replace(batch[COUNTS], examples=len(examples)), **_completions(examples)}


def _answer(pair: dict[str, Any], key: str, **of: int) -> Piece:
    """An answer behind a copy of its prompt's last token, which is not labelled."""
    prompt, answer = list(pair[PROMPT]), list(pair[key])
    return Piece(prompt[-1:] + answer, [IGNORED] * len(prompt[-1:]) + answer, max(len(prompt) - 1, 0), **of)


def _completions(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """completion_mask [2 pairs, longest sequence], and the reference's log-probabilities where the pairs have them."""
    lengths = [(len(pair[PROMPT]), len(pair[key])) for key in (CHOSEN, REJECTED) for pair in examples]
    mask = torch.zeros((len(lengths), max(prompt + answer for prompt, answer in lengths)), dtype=torch.long)
    for row, (prompt, answer) in enumerate(lengths):
        mask[row, prompt : prompt + answer] = 1
    references = {key: torch.tensor([pair[key] for pair in examples]) for key in REFERENCES if key in examples[0]}
    return {COMPLETIONS: mask, **references}
