"""The evaluation of one split, and predictions.parquet: one row per test example."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Evaluation:
    """One split evaluated: its metrics, the columns of predictions.parquet, and the metrics of each class."""

    metrics: dict[str, float]
    predictions: dict[str, list[Any]]
    per_class: list[dict[str, Any]] | None = None


def write_predictions(folder: Path, evaluations: dict[str, Evaluation]) -> None:
    """Write predictions.parquet: one row per example of the test split and of each further evaluation set."""
    import pandas

    tables = [
        pandas.DataFrame({"split": split, **evaluation.predictions})
        for split, evaluation in evaluations.items()
        if split != "validation"
    ]
    temporary = folder / ".predictions.parquet"
    pandas.concat(tables, ignore_index=True).to_parquet(temporary, index=False)
    temporary.replace(folder / "predictions.parquet")
