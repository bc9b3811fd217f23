"""Several datasets as one: their splits joined, and their training examples mixed by weight.

A row's id begins with the number of its dataset: "1:train-17" is row 17 of the train split of `datasets.1`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peft_recipes.data.columns import column_values
from peft_recipes.data.supervised import OPTIONS, TOOLS, TRAINED, same_keys
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.dataset import Dataset
from peft_recipes.recipe.mixture import FIRST_EXHAUSTED

if TYPE_CHECKING:
    import datasets

_ANY = {"id", TOOLS, OPTIONS, TRAINED}  # columns that every dataset has, or that one may have without the others
OWN_SPLITS = ("train", "validation", "test")


class Rows(Sequence):
    """The raw rows of several datasets, one after another, whose columns need not be the same."""

    def __init__(self, parts: Sequence[datasets.Dataset]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, key: Any) -> Any:
        """A row by its position, or a column that all of them have (the ids)."""
        if isinstance(key, str):
            return [value for part in self.parts for value in part[key]]
        for part in self.parts:
            if key < len(part):
                return part[key]
            key -= len(part)
        raise IndexError(key)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            yield from part


def numbered(splits: dict[str, datasets.Dataset], number: int) -> dict[str, datasets.Dataset]:
    """Splits whose ids begin with the number of their dataset, so that they are unique among several."""
    return {
        name: rows.remove_columns("id").add_column("id", [f"{number}:{one}" for one in column_values(rows, "id")])
        for name, rows in splits.items()
    }


def joined(parts: list[dict[str, datasets.Dataset]], names: list[str]) -> dict[str, datasets.Dataset]:
    """The splits of several datasets, in the form of their task, one after another; further sets are the first's.

    Raises RecipeError for datasets whose examples are of different kinds (texts, and prompts with answers).
    """
    for part, name in zip(parts, names, strict=True):
        first, own = (sorted(set(rows["train"].column_names) - _ANY) for rows in (parts[0], part))
        if first != own:
            raise RecipeError(
                f"datasets: '{names[0]}' has examples of {' and '.join(first)}, '{name}' of {' and '.join(own)}. One "
                "recipe mixes examples of one kind: name the columns of each (datasets.N.format), or leave one out."
            )
    own = {split: _concatenated([part[split] for part in parts], names) for split in OWN_SPLITS if split in parts[0]}
    return {name: own.get(name, rows) for name, rows in parts[0].items()}


def _concatenated(parts: list[datasets.Dataset], names: list[str]) -> datasets.Dataset:
    """The rows of all parts. Their messages may have other keys, or the same in another order."""
    import datasets

    with contextlib.suppress(ValueError, TypeError):  # columns, or their types, are not the same
        if all(set(part.column_names) == set(parts[0].column_names) for part in parts):
            return datasets.concatenate_datasets(parts)
    examples = [row for part in parts for row in part]
    same_keys(examples)
    try:
        return datasets.Dataset.from_list(examples, on_mixed_types="use_json")
    except (ValueError, TypeError) as error:  # pyarrow's errors are of both
        why = " ".join(str(error).split()).rstrip(".")
        raise RecipeError(f"datasets: the rows of {', '.join(names)} can't be put together ({why}).") from error


def mixed(rows: datasets.Dataset, sources: Sequence[Dataset], strategy: str) -> tuple[datasets.Dataset, str]:
    """Choose and shuffle the training examples by the weights of their datasets; return them and a note.

    Each dataset gives exactly its share. The choice and the order depend on the seed of the first dataset alone.
    Raises RecipeError for a dataset that has no example left, or whose share is less than one.
    """
    import numpy as np

    members: list[list[int]] = [[] for _ in sources]
    for index, one in enumerate(column_values(rows, "id")):
        members[int(one.partition(":")[0])].append(index)
    names = [source.path for source in sources]
    for name, indices in zip(names, members, strict=True):
        if not indices:
            raise RecipeError(f"datasets: no training example of '{name}' is left. Leave it out.")
    sizes = shares([len(indices) for indices in members], [source.weight for source in sources], strategy)
    if empty := [name for name, size in zip(names, sizes, strict=True) if size < 1]:
        raise RecipeError(
            f"datasets: the share of '{empty[0]}' is less than one example. Give it a larger weight, or set "
            "stopping_strategy: all_exhausted."
        )
    random, chosen = np.random.default_rng(sources[0].seed), []
    for indices, size in zip(members, sizes, strict=True):
        times, rest = divmod(size, len(indices))
        chosen += [*indices * times, *(random.permutation(indices)[:rest] if rest else [])]
    return rows.select(random.permutation(chosen)), _note(names, [len(one) for one in members], sizes)


def shares(counts: Sequence[int], weights: Sequence[float | None], strategy: str) -> list[int]:
    """How many training examples each dataset gives. counts: how many it has.

    Without weights all. Else in the ratio of the weights: with "first_exhausted" as many as there are before the first
    dataset has no more, with "all_exhausted" as many as it takes until the last one has given all of its examples.
    """
    if all(weight is None for weight in weights):
        return list(counts)
    numbers = [1.0 if weight is None else weight for weight in weights]
    portions = [number / sum(numbers) for number in numbers]
    totals = [count / portion for count, portion in zip(counts, portions, strict=True)]
    if strategy == FIRST_EXHAUSTED:
        # Rounded first: 100 / 0.1 * 0.1 may lie below 100.
        return [int(round(min(totals) * portion, 6)) for portion in portions]
    return [round(max(totals) * portion) for portion in portions]


def _note(names: Sequence[str], counts: Sequence[int], sizes: Sequence[int]) -> str:
    """How many training examples come from each dataset: "mixed: a.csv 300 (75 %), b.jsonl 100 (25 %)."."""
    parts = []
    for name, count, size in zip(names, counts, sizes, strict=True):
        extra = f", of {count:,}" if size < count else f", {count:,} of them repeatedly" if size > count else ""
        parts.append(f"{name} {size:,} ({100 * size / sum(sizes):.3g} %{extra})")
    return f"mixed: {', '.join(parts)}."


def agreed(values: Sequence[Any], names: Sequence[str], what: str) -> Any:
    """What all datasets have alike. Raises RecipeError with the two that differ. what: "labels"."""
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise RecipeError(
                f"datasets: the {what} of '{names[0]}' are {_shown(values[0])}, those of '{name}' {_shown(value)}. One "
                f"model learns both: set the same for each, as in --set 'datasets.0.labels=[A, B]'."
            )
    return values[0]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
