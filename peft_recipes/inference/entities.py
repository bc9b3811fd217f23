"""Find the entities of texts with a saved token classifier: type, position and score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import softmax

from peft_recipes.data import tags, words
from peft_recipes.scoring.entities import entities_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_entities(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    max_length: int,
    logits_of: Callable[..., list[np.ndarray]],
) -> list[dict[str, Any]]:
    """Find the entities of each text. Returns for each `entities`: text, label, start, end (characters) and score.

    As transformers' TokenClassificationPipeline with aggregation_strategy="first": a word's tag is that of its first
    piece, and an entity's score the mean probability of its words' tags. Words are those of training (data/words.py).
    A text longer than max_length is read in consecutive windows. For tags that mark no entities (parts of speech),
    each word is an entry.

    names: the tags in the order of the logits. logits_of(batch, order): [length, tags] of each window, where
    batch(indices) gives the model's inputs (Predictor.logits).
    """
    spans = [words.words_of(text) for text in texts]
    windows: list[words.Encoded] = []
    owners: list[int] = []  # of each window, the index of its text
    for i, (text, bounds) in enumerate(zip(texts, spans, strict=True)):
        if bounds:
            given = [text[start:end] for start, end in bounds]
            found = words.windows(tokenizer, given, words.spaces_of(text, bounds), max_length)
            windows += found
            owners += [i] * len(found)

    def batch(indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return tokenizer.pad({"input_ids": [windows[i].input_ids for i in indices]}, return_tensors="pt")

    order = np.argsort([-len(window.input_ids) for window in windows], kind="stable").tolist()
    tagged = [[(tags.OUTSIDE, 0.0)] * len(bounds) for bounds in spans]  # a word without a token is outside
    for owner, window, values in zip(owners, windows, logits_of(batch, order), strict=True):
        probabilities = softmax(values, axis=-1)
        for word, position in enumerate(window.first):
            if position is not None:
                best = int(probabilities[position].argmax())
                tagged[owner][word] = names[best], float(probabilities[position, best])
    readable = tags.entity_tags(names)
    read = dict(zip(names, readable, strict=True)) if readable else None
    return [
        {"entities": _entities(text, bounds, words_tags, read)}
        for text, bounds, words_tags in zip(texts, spans, tagged, strict=True)
    ]


def _entities(
    text: str, bounds: list[tuple[int, int]], tagged: list[tuple[str, float]], read: dict[str, str] | None
) -> list[dict[str, Any]]:
    """The entities of one text. bounds and tagged: start and end, and tag and probability, of each of its words."""
    if read is None:
        found = [(tag, i, i) for i, (tag, _) in enumerate(tagged)]
    else:
        found = entities_of([read.get(tag, tag) for tag, _ in tagged])
    return [
        {
            "text": text[bounds[first][0] : bounds[last][1]],
            "label": label,
            "start": bounds[first][0],
            "end": bounds[last][1],
            "score": float(np.mean([score for _, score in tagged[first : last + 1]])),
        }
        for label, first, last in found
    ]
