"""What a classifier's logits say (a class, several classes or a number), and how a result is written to a file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from peft_recipes.inference.outputs import write_table
from peft_recipes.inference.tables import Table
from peft_recipes.recipe.dataset import MULTI_LABEL, REGRESSION

THRESHOLD = 0.5  # the probability above which a text has a class, of several


def result(problem_type: str, logits: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return what one example's logits [outputs] say.

    One class: `label`, `probability` and the `probabilities` of all classes by name. Several classes: `labels`, those
    above `THRESHOLD`, and the `probabilities`. A number: `value`.
    """
    if problem_type == REGRESSION:
        return {"value": float(logits[0])}
    logits = logits.astype(np.float64)
    values = expit(logits) if problem_type == MULTI_LABEL else softmax(logits)
    by_name = dict(zip(names, map(float, values), strict=True))
    if problem_type == MULTI_LABEL:
        return {"labels": [name for name, value in by_name.items() if value > THRESHOLD], "probabilities": by_name}
    label = max(by_name, key=by_name.__getitem__)
    return {"label": label, "probability": by_name[label], "probabilities": by_name}


def in_words(row: dict[str, Any] | None) -> tuple[str, str]:
    """Return a result for the terminal: label and probability, the labels with their probabilities, or the number."""
    if row is None:
        return "(no text)", ""
    if "value" in row or "score" in row:
        return f"{row.get('value', row.get('score')):.4g}", ""
    if "labels" in row:
        return ", ".join(f"{name} {row['probabilities'][name]:.1%}" for name in row["labels"]) or "(none)", ""
    return row["label"], f"{row['probability']:6.1%}"


def write_results(
    table: Table, results: Sequence[dict[str, Any] | None], output: Path, source: Path | None = None
) -> None:
    """Write rows with their results as columns: label and probability, labels and probabilities, value, or entities.

    A column that the rows have stays: the result is in predicted_label (predicted_label_2, and so on) then. A row
    without a result (None: it has no text) has nothing in these columns. source: the file of the rows.
    """
    first = next(each for each in results if each is not None)
    keys = ("label", "probability") if "label" in first else tuple(first)
    added: dict[str, list[Any]] = {}
    for key in keys:
        names = itertools.chain((key, f"predicted_{key}"), (f"predicted_{key}_{n}" for n in itertools.count(2)))
        added[next(name for name in names if name not in table.columns)] = [each and each[key] for each in results]
    write_table(table, added, output, source)
