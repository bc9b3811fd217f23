"""The evaluation of one split, and predictions.parquet: one row per test example."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_recipes.runs.predictions import Evaluation


def write_predictions(folder: Path, evaluations: dict[str, Evaluation]) -> None:
    """predictions.parquet: one row an example of the test split and of each further evaluation set."""
    import pandas

    tables = [pandas.DataFrame({"split": split, **result.predictions})
              for split, result in evaluations.items() if split != "validation"]  # fmt: skip
    temporary = folder / ".predictions.parquet"
    pandas.concat(tables, ignore_index=True).to_parquet(temporary, index=False)
    temporary.replace(folder / "predictions.parquet")


@dataclass
class Evaluation:
    """One split evaluated. scores: what the metric is the mean of, one an example, weighted by `weights` if given."""

    metrics: dict[str, float]
    predictions: dict[str, list[Any]]
    per_class: list[dict[str, Any]] | None = None
