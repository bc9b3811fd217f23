"""What a classifier's logits say (a class, several classes or a number), and how a result is written to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit, softmax

from peft_recipes.inference import inputs
from peft_recipes.recipe.dataset import MULTI_LABEL, REGRESSION

if TYPE_CHECKING:
    import datasets

THRESHOLD = 0.5  # the probability above which a text has a class, of several

_NO_LISTS = (".csv", ".tsv")  # lists and mappings are JSON text there


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


def in_words(row: dict[str, Any]) -> tuple[str, str]:
    """Return a result for the terminal: label and probability, the labels with their probabilities, or the number."""
    if "value" in row or "score" in row:
        return f"{row.get('value', row.get('score')):.4g}", ""
    if "labels" in row:
        return ", ".join(f"{name} {row['probabilities'][name]:.1%}" for name in row["labels"]) or "(none)", ""
    return row["label"], f"{row['probability']:6.1%}"


def write_results(rows: datasets.Dataset, results: list[dict[str, Any]], output: Path) -> None:
    """Write rows with their results as columns: label and probability, labels and probabilities, value, or entities.

    Columns of that name are kept, and a result is in predicted_label (and so on) then.
    """
    keys = ("label", "probability") if "label" in results[0] else tuple(results[0])
    for key in keys:
        name = key if key not in rows.column_names else f"predicted_{key}"
        rows = rows.remove_columns([name]) if name in rows.column_names else rows
        values = [each[key] for each in results]
        as_text = output.suffix in _NO_LISTS and isinstance(values[0], (list, dict))
        rows = rows.add_column(name, [json.dumps(value, ensure_ascii=False) for value in values] if as_text else values)
    inputs.write_rows(rows, output)
