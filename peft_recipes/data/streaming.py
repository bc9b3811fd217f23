"""Datasets that are read as a stream, for what does not fit on a disk: never more than a buffer of rows in memory.

Validation and test are the first rows of the stream, or of splits of their own. Training reads the rest in the order
of a shuffled buffer, which depends on a seed alone, as often as it takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.data import files, located
from peft_recipes.errors import RecipeError, root_cause, unknown
from peft_recipes.models.bases import hub_errors
from peft_recipes.recipe.dataset import EMBEDDED, REGRESSION, Dataset

if TYPE_CHECKING:
    import datasets

SAMPLE = 512  # training rows that are read first, for the checks and for the memory of a step
CHUNK = 256  # rows that are converted at once
KEPT = "kept"  # the id of the row that each chunk begins with
_OWN = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval", "evaluation")}

Convert = Callable[["datasets.Dataset"], "datasets.Dataset"]


class Stream:
    """The training rows of a streamed dataset, read again for each pass.

    rows: those after the rows of validation and test, each with an `id`. columns: of each row. convert: turns some
    rows into examples of the trainer, with their `id`; None until the task has prepared the sample. example: a row
    that can be used, which stands at the head of every chunk, so that none is without a usable row.
    """

    def __init__(self, rows: datasets.IterableDataset, columns: list[str], buffer: int):
        self.rows, self.columns, self.buffer = rows, columns, buffer
        self.convert: Convert | None = None
        self.example: dict[str, Any] | None = None
        self.features: datasets.Features | None = None

    def ordered(self, seed: int) -> datasets.IterableDataset:
        """The examples in the order of a seed, without an end: each pass has an order of its own."""
        import datasets

        return datasets.IterableDataset.from_generator(_Passes(self, seed), features=self.features)

    def examples(self, rows: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
        """The examples of `rows`, converted chunk by chunk."""
        import datasets

        iterator = iter(rows)
        while chunk := list(itertools.islice(iterator, CHUNK)):
            listed = [{**self.example, "id": KEPT}, *chunk]
            table = [{name: row.get(name) for name in self.columns} for row in listed]
            for example in self.convert(datasets.Dataset.from_list(table, on_mixed_types="use_json")):
                if example.pop("id") != KEPT:
                    yield example


class _Passes:
    """A generator of the examples of one pass after another, which `datasets` can call again."""

    def __init__(self, stream: Stream, seed: int):
        self.stream, self.seed = stream, seed

    def __call__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            count = 0
            shuffled = self.stream.rows.shuffle(seed=self.seed + number, buffer_size=self.stream.buffer)
            for example in self.stream.examples(shuffled):
                count += 1
                yield example
            if not count:
                raise RuntimeError("The stream has no training example: all its rows are in validation and test, or "
                                   "can't be used.")  # fmt: skip

    def __deepcopy__(self, memo: Any) -> _Passes:
        return self

    def __reduce__(self) -> Any:  # `datasets` hashes a generator by its pickle: the rows are no part of it
        return _Passes, (None, self.seed)


def streamed_splits(source: Dataset, notes: list[str] | None = None) -> tuple[dict[str, datasets.Dataset], Stream]:
    """The first rows of each split in memory (of train a sample), each with an `id`, and the stream of train.

    Test and validation are those that `source` names, else the dataset's own, else the first rows of train. notes: gets
    which of its own are used. Raises RecipeError: a missing dataset or split, fewer rows than validation, test and one
    training row need.
    """
    opened = _open(source)
    single = len(opened) == 1
    names = {
        "train": next(iter(opened)) if single else source.train_split,
        "validation": None if single else source.validation_split,
        "test": None if single else source.test_split,
    }
    for split, name in names.items():
        if name is not None and name not in opened:
            where = f"dataset '{source.path}'"
            raise RecipeError(unknown("split", name, opened, where) + f" Set dataset.{split}_split.")
    own = {} if single else _own_splits(opened, names)
    train, taken, splits = _with_ids(opened[names["train"]], names["train"]), 0, {}
    for split in ("validation", "test"):
        count = int(getattr(source, split))
        name = names[split] or own.get(split)
        if name is None or name == names["train"]:
            rows, taken = train.skip(taken).take(count), taken + count
        else:
            rows = _with_ids(opened[name], name).take(count)
        splits[split] = _in_memory(rows, f"{split}: {count} rows", source, least=1 if split in own else None)
        if split in own and notes is not None:
            count = len(splits[split])
            notes.append(
                f"The {split} split is the dataset's own split '{name}' (its first {count} rows). "
                f"--set dataset.{split}_split={names['train']} cuts it from '{names['train']}' instead."
            )
    rest = train.skip(taken)
    splits["train"] = _in_memory(rest.take(SAMPLE), "training: one row", source, least=1)
    ordered = {split: splits[split] for split in ("train", "validation", "test")}
    return ordered, Stream(rest, splits["train"].column_names, source.shuffle_buffer)


def _own_splits(opened: dict[str, Any], names: dict[str, str | None]) -> dict[str, str]:
    """The dataset's own splits for the test and validation splits that the recipe does not name."""
    own = {}
    for split, usual in _OWN.items():
        found = next((name for name in usual if name in opened and name not in names.values()), None)
        if names[split] is None and found:
            own[split] = found
    return own


def _in_memory(
    rows: datasets.IterableDataset, needed: str, source: Dataset, least: int | None = None
) -> datasets.Dataset:
    import datasets

    try:
        read = list(rows)
    except Exception as error:  # datasets and pandas raise what their readers do
        raise RecipeError(f"dataset '{source.path}' can't be read as a stream: {root_cause(error)}") from error
    if not read or (least is None and len(read) < int(needed.split(": ")[1].split()[0])):
        raise RecipeError(f"dataset '{source.path}' has too few rows for {needed}. Set smaller numbers of rows.")
    columns = list(dict.fromkeys(name for row in read for name in row))
    table = [{name: row.get(name) for name in columns} for row in read]
    return datasets.Dataset.from_list(table, on_mixed_types="use_json")


def _with_ids(rows: datasets.IterableDataset, split: str) -> datasets.IterableDataset:
    return rows.map(lambda row, number: {"id": f"{split}-{number}"}, with_indices=True)


def _open(source: Dataset) -> dict[str, datasets.IterableDataset]:
    import datasets

    if source.path.startswith(EMBEDDED):
        from peft_recipes.embedded.stand_ins import dataset

        made = dataset(source.path.removeprefix(EMBEDDED))
        return {split: rows.to_iterable_dataset() for split, rows in made.items()}
    path = Path(source.path).expanduser()
    found = located.local_files(path, source)
    if found is None:
        with hub_errors("dataset", source.path):
            name = str(path) if path.is_dir() else source.path
            return dict(datasets.load_dataset(name, source.name, revision=source.revision, streaming=True))
    listed = [one for paths in found.values() for one in paths]
    readers = {files.format_of(one) for one in listed}
    if len(readers) > 1:
        raise RecipeError(f"dataset '{source.path}' has files of several formats, and a stream reads one. Name them: "
                          f"--set dataset.path='{path}/*{listed[0].suffix}'.")  # fmt: skip
    for one in listed:
        if not one.is_file() or not one.stat().st_size:
            raise RecipeError(f"dataset file {one} is {'empty' if one.is_file() else 'not there'}.")
    named = {split: [str(one) for one in paths] for split, paths in found.items()}
    options = _csv_options(listed, source) if readers == {"csv"} else {}
    try:
        return dict(datasets.load_dataset(readers.pop(), data_files=named, streaming=True, **options))
    except Exception as error:
        raise RecipeError(f"dataset '{source.path}' can't be read as a stream: {root_cause(error)}") from error


def _csv_options(paths: list[Path], source: Dataset) -> dict[str, Any]:
    """How csv files are read: every cell as text, but a label that is a number to learn."""
    import datasets

    headers = {}
    for path in paths:
        with files.opened_text(path) as file:
            _, names, delimiter = files.csv_reader(path, iter(file))
        headers[(delimiter, *names)] = path
    if len(headers) > 1:
        shown = "; ".join(f"{path.name}: {', '.join(names)}" for (_, *names), path in headers.items())
        raise RecipeError(f"The files of '{source.path}' have different columns ({shown}). Name one of them.")
    ((delimiter, *names),) = headers
    number = source.label if source.problem_type == REGRESSION else None
    types = {name: datasets.Value("float64" if name == number else "string") for name in names}
    return {"sep": delimiter, "keep_default_na": False, "encoding": "utf-8-sig", "features": datasets.Features(types)}
