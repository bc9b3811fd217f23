"""What a recipe with `dataset.streaming` needs, and what it can't have."""

from __future__ import annotations

from typing import Any

# Tasks whose training examples can come as a stream.
STREAMED_TASKS = ("sft", "language-modeling", "text-classification")
_REGRESSION = "regression"


def streaming_problems(recipe: Any) -> list[str]:
    """Return every problem of a recipe that streams its data, one line each; none for one that does not."""
    sources = recipe.datasets or [recipe.dataset]
    if not any(source.streaming for source in sources):
        return []
    if recipe.datasets is not None:
        return ["datasets: streaming reads one dataset. Set dataset instead, or leave streaming out."]
    source, training = recipe.dataset, recipe.training
    if recipe.task not in STREAMED_TASKS:
        return [f"dataset.streaming: not for task {recipe.task}, only for {', '.join(STREAMED_TASKS)}."]
    wrong = {
        "training.max_steps: needed with dataset.streaming: a stream has no length. --set training.max_steps=1000.": (
            training.get("max_steps", -1) < 1
        ),
        "dataset.balance: a stream is not counted by class. Leave it out.": source.balance,
        "dataset.pretrain: not with dataset.streaming. Leave it out.": source.pretrain,
        "dataset.train: a stream is read until training.max_steps. Leave it out.": source.train is not None,
        "dataset.labels: needed with dataset.streaming: the class names, in order, before all rows are read.": (
            recipe.task == "text-classification" and not source.labels and source.problem_type != _REGRESSION
        ),
        "training.train_sampling_strategy: a stream has its own order. Leave it out.": (
            training.get("train_sampling_strategy", "random") != "random"
        ),
        "training.dataloader_num_workers: a stream is read by one process. Leave it out.": (
            training.get("dataloader_num_workers", 0) > 0
        ),
    }
    problems = [problem for problem, is_wrong in wrong.items() if is_wrong]
    problems += [
        f"dataset.{split}: {size!r} is a share of rows that a stream does not count. Set a number of rows: "
        f"--set dataset.{split}=500."
        for split in ("validation", "test")
        if not _is_count(size := getattr(source, split))
    ]
    heads = [name for name, arm in recipe.arms.items() if getattr(arm, "method", None) == "head"]
    return problems + [
        f"arms.{name}: 'head' trains on features of all examples, computed once; a stream has no end. Leave it out."
        for name in heads
    ]


def _is_count(size: Any) -> bool:
    return isinstance(size, (int, float)) and size >= 1
