"""Read a recipe's data in the form of its task: one dataset, or several that are mixed.

The functions take a `Task` (base.py, which imports this file).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from peft_recipes.data import mixing
from peft_recipes.errors import RecipeError, within

T = TypeVar("T")
Splits = dict[str, Any]


def read(task: Any, convert: Callable[[Splits], tuple[Splits, T]]) -> tuple[Splits, Splits, list[T]]:
    """Load each dataset of the task's recipe and `convert` it, and join the results.

    convert: raw splits -> the splits in the form of the task, and what else it finds. Returns the raw splits, the
    converted ones, and what else was found in each dataset. Raises RecipeError, for several with the one's number.
    """
    recipe = task.recipe
    if recipe.datasets is None:
        raw = task.raw_splits()
        splits, found = convert(raw)
        return raw, splits, [found]
    raws, parts, all_found = [], [], []
    try:
        for number, task.reading in enumerate(recipe.datasets):
            with _within(number):
                raws.append(task.raw_splits(number))
                splits, found = convert(raws[-1])
            parts.append(splits)
            all_found.append(found)
    finally:
        task.reading = None
    names = [source.path for source in recipe.datasets]
    together = {split: mixing.Rows([raw[split] for raw in raws]) for split in mixing.OWN_SPLITS if split in raws[0]}
    task.read = {**raws[0], **together}
    return task.read, mixing.joined(parts, names), all_found


@contextlib.contextmanager
def _within(number: int) -> Iterator[None]:
    """Let the messages of an error name one of several datasets, and its options as `--set` takes them."""
    where = f"datasets.{number}"
    try:
        with within(where):
            yield
    except RecipeError as error:
        raise RecipeError(*(re.sub(r"\bdataset\.(?=[a-z])", f"{where}.", text) for text in error.problems)) from error


def mixed(task: Any, splits: Splits) -> tuple[Splits, list[str]]:
    """The splits with the training examples of several datasets mixed by weight, and a note with their numbers."""
    recipe = task.recipe
    if recipe.datasets is None:
        return splits, []
    train, note = mixing.mixed(splits["train"], recipe.datasets, recipe.stopping_strategy)
    return {**splits, "train": train}, [note]


def named_notes(task: Any, found: list[list[str]]) -> list[str]:
    """The notes on each dataset; of several, with its path."""
    if task.recipe.datasets is None:
        return list(found[0])
    return [
        f"{source.path}: {note}" for source, notes in zip(task.recipe.datasets, found, strict=True) for note in notes
    ]
