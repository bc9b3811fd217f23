"""Entity metrics are seqeval's, also of invalid tag sequences; their pseudo-values have them as means."""

from __future__ import annotations

import random

import numpy as np
import pytest
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score

from peft_recipes.scoring.entities import entity_metrics, entity_pseudo_values, per_type

TAGS = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def drawn(seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """References and predictions, half of them right; both have I- without B-."""
    draw = random.Random(seed)
    references = [[draw.choice(TAGS) for _ in range(draw.randint(1, 9))] for _ in range(60)]
    return references, [[tag if draw.random() < 0.7 else draw.choice(TAGS) for tag in row] for row in references]


def test_metrics_and_types_are_those_of_seqeval():
    references, predictions = drawn(0)
    assert entity_metrics(references, predictions) == pytest.approx({
        "entity_f1": f1_score(references, predictions),
        "entity_precision": precision_score(references, predictions),
        "entity_recall": recall_score(references, predictions),
    })  # fmt: skip
    report = classification_report(references, predictions, output_dict=True)
    for row in per_type(references, predictions):
        own = [row["precision"], row["recall"], row["f1"], row["support"]]
        assert own == pytest.approx(list(report[row["label"]].values()))
    assert [row["label"] for row in per_type(references, predictions)] == ["LOC", "PER"]


def test_an_inside_tag_without_a_beginning_begins_an_entity():
    assert entity_metrics([["B-PER", "I-PER", "O"]], [["I-PER", "I-PER", "O"]])["entity_f1"] == 1.0


def test_pseudo_values_have_the_metric_as_mean_and_its_variance():
    references, predictions = drawn(1)
    metrics, values = entity_metrics(references, predictions), entity_pseudo_values(references, predictions)
    for name, value in metrics.items():
        assert np.mean(values[name]) == pytest.approx(value)
    draw = np.random.default_rng(0)
    resampled = []
    for _ in range(400):
        chosen = draw.integers(0, 60, 60)
        resampled.append(entity_metrics([references[i] for i in chosen], [predictions[i] for i in chosen])["entity_f1"])
    assert np.std(values["entity_f1"]) / np.sqrt(60) == pytest.approx(np.std(resampled), rel=0.15)


def test_sentences_without_entities_have_a_metric_of_zero():
    assert entity_metrics([["O"], ["O", "O"]], [["O"], ["O", "O"]]) == dict.fromkeys(
        ("entity_f1", "entity_precision", "entity_recall"), 0.0
    )
    assert per_type([["O"]], [["O"]]) == [] and entity_pseudo_values([["O"]] * 3, [["O"]] * 3)["entity_f1"] == [0.0] * 3
