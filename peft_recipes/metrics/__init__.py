"""Metrics for the `evaluate` library that need no Hub: one folder and one script each, beside this file.

`evaluate.load(metrics.path("accuracy"))` works on every one of them. `load` here takes a shorter way to the same class:
evaluate.load copies the script into the user's Hugging Face folder and imports the copy, so it fails where that folder
can't be written, and a process killed while copying leaves half a script that every later call imports.
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown

if TYPE_CHECKING:
    import evaluate

NAMES = ("accuracy", "macro_f1", "per_class", "perplexity", "preference_accuracy", "token_accuracy")


def path(name: str) -> str:
    """The script of a metric, for `evaluate.load`. Raises RecipeError, naming the nearest, for an unknown name."""
    if name not in NAMES:
        raise RecipeError(unknown("metric", name, NAMES))
    return str(Path(__file__).parent / name / f"{name}.py")


def load(name: str) -> evaluate.Metric:
    """A fresh `evaluate.Metric`: it keeps its inputs in memory, so any number of processes can use it at once.

    Fresh, because a metric that has raised keeps the rows it had taken before and adds them to the next result.
    Raises RecipeError, naming the nearest, for an unknown name.
    """
    return _metric_class(name)(keep_in_memory=True, cache_dir=_scratch().name)


def compute(name: str, **inputs: Any) -> dict[str, Any]:
    """The result of one metric over all rows: `compute("accuracy", predictions=[1, 0], references=[1, 1])`.

    The head of each metric's script says which inputs it takes. Raises RecipeError for an unknown name, and ValueError
    for inputs that are missing, of unequal length, or empty.
    """
    metric = load(name)
    missing = [column for column in metric.features if inputs.get(column) is None]
    if missing:
        raise ValueError(f"Metric '{name}' needs {' and '.join(metric.features)}; got no {' and no '.join(missing)}.")
    rows = {column: len(inputs[column]) for column in metric.features}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        raise ValueError(f"Metric '{name}' needs as many of each, and at least one; got {rows}.")
    return metric.compute(**inputs)


@cache
def _metric_class(name: str) -> type[evaluate.Metric]:
    path(name)
    module = importlib.import_module(f"{__name__}.{name}.{name}")
    classes = [item for _, item in inspect.getmembers(module, inspect.isclass) if item.__module__ == module.__name__]
    return classes[0]


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    """evaluate makes a folder for each metric even when it keeps all in memory; this one goes with the process."""
    return tempfile.TemporaryDirectory(prefix="peft-recipes-metrics-")
