"""Entity metrics of tagged sentences: precision, recall and F1 over entities, by seqeval.

An entity counts as right if its first word, last word and type are. Tag sequences that no scheme allows (I- without B-)
are read as seqeval's default and conlleval read them: such a tag begins an entity.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_recipes.scoring.pseudo_values import pseudo_values

METRICS = ("entity_f1", "entity_precision", "entity_recall")
Tags = Sequence[Sequence[str]]
"""The tags of each sentence."""


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first and last word of each entity of a sentence."""
    from seqeval.metrics.sequence_labeling import get_entities

    return get_entities(list(tags))


def entity_metrics(references: Tags, predictions: Tags) -> dict[str, float]:
    """entity_f1, entity_precision and entity_recall over all entities; 0 for 0 divided by 0."""
    precision, recall, f1, _ = _scores(references, predictions, "micro")
    return dict(zip(METRICS, (float(f1), float(precision), float(recall)), strict=True))


def per_type(references: Tags, predictions: Tags) -> list[dict[str, Any]]:
    """label, precision, recall, f1 and support of every entity type, sorted by type; 0 for 0 divided by 0."""
    types = sorted({entity[0] for tags in (*references, *predictions) for entity in entities_of(tags)})
    columns = _scores(references, predictions, None) if types else ((), (), (), ())
    return [
        {"label": label, "precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(count)}
        for label, precision, recall, f1, count in zip(types, *columns, strict=True)
    ]


def entity_pseudo_values(references: Tags, predictions: Tags) -> dict[str, list[float]]:
    """For each of METRICS one value per sentence, whose mean is the metric (see pseudo_values.py)."""
    counts = np.array([_counts(*pair) for pair in zip(references, predictions, strict=True)], dtype=float)
    statistics = (
        lambda sums: _ratio(2 * sums[2], sums[0] + sums[1]),
        lambda sums: _ratio(sums[2], sums[1]),
        lambda sums: _ratio(sums[2], sums[0]),
    )
    return {name: pseudo_values(of, counts).tolist() for name, of in zip(METRICS, statistics, strict=True)}


def _counts(references: Sequence[str], predictions: Sequence[str]) -> tuple[int, int, int]:
    """The entities of a sentence, those predicted, and those predicted correctly."""
    true, predicted = set(entities_of(references)), set(entities_of(predictions))
    return len(true), len(predicted), len(true & predicted)


def _ratio(part: float, of: float) -> float:
    return part / of if of else 0.0


def _scores(references: Tags, predictions: Tags, average: str | None) -> Any:
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's on the empty arrays of data without an entity
        return precision_recall_fscore_support(
            [list(tags) for tags in references],
            [list(tags) for tags in predictions],
            average=average,
            zero_division=0,
        )
