"""The evaluation of one split, and the tables with a row per test example: predictions and preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Evaluation:
    """One split evaluated: its metrics, the columns of predictions.parquet, and the metrics of each class.

    errors: metrics that could not be computed, with the reason; the answers that they are of are in the columns.
    """

    metrics: dict[str, float]
    predictions: dict[str, list[Any]]
    per_class: list[dict[str, Any]] | None = None
    errors: dict[str, str] = field(default_factory=dict)


PREFERENCES = "preferences.parquet"


def write_preferences(folder: Path, columns: dict[str, list[Any]] | None) -> None:
    """Write preferences.parquet: one row per judged test example. None deletes that of an earlier comparison."""
    import pandas

    if columns is None:
        (folder / PREFERENCES).unlink(missing_ok=True)
        return
    temporary = folder / f".{PREFERENCES}"
    pandas.DataFrame({"split": "test", **columns}).to_parquet(temporary, index=False)
    temporary.replace(folder / PREFERENCES)


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
