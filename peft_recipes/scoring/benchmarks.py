"""Benchmarks: lm-evaluation-harness (lm_eval) on a language model in memory, example by example.

Prompts, answers and metrics are lm_eval's own, so a benchmark's value equals that of `lm_eval --model hf` on the saved
model. The chat template is not applied, which is lm_eval's default. An example's score is such that the mean over the
examples is the metric: its value where the metric is a mean, else its jackknife pseudo-value.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.scoring.benchmark_tasks import quiet

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from torch import nn

BATCH_SIZE = 8


@dataclass
class Benchmark:
    """One benchmark's result.

    metrics: every metric of the tasks. predictions: the columns of predictions.parquet: `id` (doc id; in a group
    "task/doc id") and the compared metric.
    facts: its entry in run.json: `metric` (the compared one), `higher_is_better`, `share` (from 0 to 1, shown in
    percent), `examples`, `tasks` (lm_eval's names), `filter` (of the answers), `lm_eval` (its version).
    """

    metrics: dict[str, float]
    predictions: dict[str, list[Any]]
    facts: dict[str, Any]


def run_benchmark(
    model: nn.Module, tokenizer: Any, tasks: Sequence[Task], examples: int | None = None, batch_size: int = BATCH_SIZE
) -> Benchmark:
    """Evaluate a language model on the tasks of one benchmark (more than one: a group, whose examples are pooled).

    examples: the most, the first of each task, shared evenly between the tasks of a group; None: all.
    Raises RecipeError for a group whose tasks have no metric in common.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    limit = None if examples is None else max(1, math.ceil(examples / len(tasks)))
    with quiet(), _as_before(model):
        # lm_eval sets a padding token and the padding side: on a copy.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = simple_evaluate(
            lm, tasks=list(tasks), limit=limit, log_samples=True, bootstrap_iters=0, task_manager=_no_tasks()
        )
    return _result(tasks, found["samples"])


def _result(tasks: Sequence[Task], samples: dict[str, list[dict[str, Any]]]) -> Benchmark:
    """Pool lm_eval's samples of the tasks. Of several filters of the answers the first counts."""
    aggregations = tasks[0].aggregation()
    first = {task.task_name: samples[task.task_name][0]["filter"] for task in tasks}
    rows = [
        (f"{task.task_name}/{row['doc_id']}" if len(tasks) > 1 else str(row["doc_id"]), row)
        for task in tasks
        for row in sorted(samples[task.task_name], key=lambda row: row["doc_id"])
        if row["filter"] == first[task.task_name]
    ]
    names = [name for name in aggregations if all(name in row for _, row in rows)]
    if not names:
        raise RecipeError(
            f"benchmarks: the tasks {', '.join(task.task_name for task in tasks)} have no metric in common. "
            "Name them one by one."
        )
    values = {name: [row[name] for _, row in rows] for name in names}
    metrics = {name: float(aggregations[name](values[name])) for name in names}
    means = [name for name in names if _is_mean(values[name], metrics[name])]
    metric = (means or names)[0]
    scores = values[metric] if means else _pseudo_values(aggregations[metric], values[metric])
    scores = [float(score) for score in scores]
    if not all(map(math.isfinite, scores)):
        raise RuntimeError(f"{sum(not math.isfinite(score) for score in scores)} scores of {metric} are not finite.")
    higher = bool(tasks[0].higher_is_better().get(metric, True))
    facts = {
        "metric": metric,
        "higher_is_better": higher,
        "share": bool(means) and higher and all(0 <= score <= 1 for score in scores),
        "examples": len(rows),
        "tasks": [task.task_name for task in tasks],
        "filter": first[tasks[0].task_name],
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    return Benchmark(metrics, {"id": [name for name, _ in rows], metric: scores}, facts)


def _is_mean(values: list[Any], metric: float) -> bool:
    """Whether a metric is the mean of its values over the examples."""
    numbers = all(isinstance(value, (bool, int, float)) or getattr(value, "ndim", None) == 0 for value in values)
    return numbers and math.isclose(sum(map(float, values)) / len(values), metric, rel_tol=1e-9, abs_tol=1e-12)


def _pseudo_values(aggregation: Callable[[list[Any]], float], values: list[Any]) -> list[float]:
    """Jackknife pseudo-values n T - (n - 1) T[-i], shifted so that their mean is exactly T (Tukey 1958; Efron 1982)."""
    count, complete = len(values), float(aggregation(values))
    without = [float(aggregation(values[:i] + values[i + 1 :])) for i in range(count)]
    raw = [count * complete - (count - 1) * each for each in without]
    return [each + complete - sum(raw) / count for each in raw]


@contextlib.contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Give the model its mode back: lm_eval sets evaluation mode."""
    training = model.training
    try:
        yield
    finally:
        model.train(training)


def _no_tasks() -> Any:
    """An index without tasks: they are loaded already, and lm_eval would read all its files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)
