"""Several datasets in one recipe (`datasets`): reading the entries, and the checks of an entry and of all together."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.dataset import Dataset
from peft_recipes.recipe.serialization import dataclass_from_dict

# The words of datasets.interleave_datasets.
FIRST_EXHAUSTED, ALL_EXHAUSTED = STRATEGIES = ("first_exhausted", "all_exhausted")
NAMES_APART = " + "
# What all datasets of a recipe have alike.
_SHARED = ("problem_type", "chat_template")
# Tasks whose examples are more than text and label: pictures of one size and transform.
_SINGLE_TASKS = ("image-classification",)


def entries(given: Any) -> tuple[list[Dataset], list[str]]:
    """Build the entries of `datasets` from mappings, paths and Datasets; return them and the problems found."""
    if not isinstance(given, (list, tuple)):
        return [], [f"datasets: expected a list of datasets, got {type(given).__name__}."]
    made, problems = [], []
    for number, entry in enumerate(given):
        dataset, more = dataclass_from_dict(entry, Dataset, f"datasets.{number}")
        problems += more
        if dataset is not None:
            made.append(dataset)
    return made, problems


def use_entries(recipe: Any) -> None:
    """Build the entries of a recipe's `datasets`, and let its `dataset` be the first of them.

    Raises RecipeError: no entry, one that is wrong, another `dataset` next to them.
    """
    if recipe.datasets is None:
        return
    recipe.datasets, problems = entries(recipe.datasets)
    if not recipe.datasets and not problems:
        problems.append("datasets: an empty list. Name one dataset or more, or leave it out and set dataset.")
    if recipe.dataset is not None and recipe.dataset not in recipe.datasets[:1]:
        problems.append(
            "dataset and datasets: a recipe has one of them. Leave one out: --set dataset=null, or --set datasets=null."
        )
    if problems:
        raise RecipeError(*problems)
    recipe.dataset = recipe.datasets[0]


def mixture_problems(recipe: Any) -> list[str]:
    """Return every problem of a recipe's `datasets`, one line each, beyond those of its first entry alone."""
    problems = []
    if recipe.stopping_strategy not in STRATEGIES:
        problems.append(unknown("stopping_strategy", recipe.stopping_strategy, STRATEGIES))
    if recipe.datasets is None:
        if recipe.dataset.weight is not None:
            problems.append("dataset.weight: the share of a dataset among several; it needs `datasets` instead.")
        return problems
    if recipe.task in _SINGLE_TASKS:
        problems.append(f"datasets: task {recipe.task} learns from one dataset. Set dataset instead.")
    first = recipe.datasets[0]
    for number, entry in enumerate(recipe.datasets):
        where = f"datasets.{number}"
        if number:
            problems += entry.problems(where)
        if entry.pretrain:
            problems.append(f"{where}.pretrain: for a recipe with one dataset alone.")
        for key in _SHARED:
            own, others = getattr(entry, key), getattr(first, key)
            if own != others:
                problems.append(f"{where}.{key}: {own!r}, and datasets.0 has {others!r}; one model learns both.")
    return problems


def mixture_to_dict(recipe: Any, plain: dict[str, Any]) -> None:
    """Write the datasets of a recipe into `plain`: one under `dataset`, several under `datasets` alone."""
    if recipe.datasets is None:
        for key in ("datasets", "stopping_strategy"):
            del plain[key]
        plain["dataset"] = dataclasses.asdict(recipe.dataset)
        left_out = ["weight", *([] if recipe.dataset.streaming else ["streaming", "shuffle_buffer"])]
        for key in left_out:
            del plain["dataset"][key]
    else:
        del plain["dataset"]
        plain["datasets"] = [dataclasses.asdict(entry) for entry in recipe.datasets]


def dataset_changes(recipe: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes of `Recipe.with_changes` that set the same keys of its dataset, or of each of several."""
    if recipe.datasets is None:
        return {"dataset": changes}
    return {"datasets": [{**dataclasses.asdict(entry), **changes} for entry in recipe.datasets]}
