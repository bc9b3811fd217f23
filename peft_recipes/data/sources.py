"""Load a recipe's `Dataset` from the Hub, local files or embedded stand-ins, and split it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError, nearest, unknown
from peft_recipes.models.bases import hub_errors, is_local
from peft_recipes.recipe.dataset import EMBEDDED, Dataset

if TYPE_CHECKING:
    import datasets

READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_splits(source: Dataset) -> dict[str, datasets.Dataset]:
    """Load the splits "train", "validation", "test" ("pretrain" too, where set), each with an `id` column.

    The splits depend on `source` alone, never on a run's seed: every arm and every seed gets the same ones. Rows are
    shuffled with `source.seed` first, as many datasets are sorted by label (IMDB is).
    Raises RecipeError: a missing or empty dataset, an impossible split or size, a broken line in a file.
    """
    raw = _read(source)
    single = len(raw) == 1
    named = {
        "train": next(iter(raw)) if single else source.train_split,
        "validation": None if single else source.validation_split,
        "test": None if single else source.test_split,
    }
    for split, name in named.items():
        if name is not None and name not in raw:
            raise RecipeError(unknown("split", name, raw, f"dataset '{source.path}'") + f" Set dataset.{split}_split.")
    pool = _shuffled(_with_ids(raw[named["train"]], named["train"]), source)
    splits: dict[str, datasets.Dataset] = {}
    for split in ("validation", "test"):
        if named[split] is not None:
            rows = _shuffled(_with_ids(raw[named[split]], named[split]), source)
            splits[split] = rows.select(range(_count(getattr(source, split), len(rows), len(rows), split, source)))
    if source.pretrain:
        count = _count(source.pretrain, len(pool), len(pool), "pretrain", source)
        splits["pretrain"], pool = pool.select(range(count)), pool.select(range(count, len(pool)))
    splits |= _cut(pool, [s for s in ("train", "validation", "test") if s not in splits], source)
    return {split: splits[split] for split in ("pretrain", "train", "validation", "test") if split in splits}


def load_test(source: Dataset) -> datasets.Dataset:
    """Load a further evaluation set: the test split, or the only one, without blank texts.

    Nothing is held back for training. Raises RecipeError as `load_splits` does.
    """
    raw = _read(source)
    name = next(iter(raw)) if len(raw) == 1 else source.test_split or "test"
    if name not in raw:
        raise RecipeError(unknown("split", name, raw, f"dataset '{source.path}'") + " Set its test_split.")
    rows = _shuffled(_with_ids(raw[name], name), source)
    for column in source.text_columns:
        if column in rows.column_names:
            texts = rows[column]
            rows = rows.select([i for i, text in enumerate(texts) if not isinstance(text, str) or text.strip()])
    return rows.select(range(_count(source.test, len(rows), len(rows), "test", source)))


def _cut(pool: datasets.Dataset, splits: list[str], source: Dataset) -> dict[str, datasets.Dataset]:
    """Cut one shuffled pool into `splits`; those without a size share the rest equally."""
    total, sizes = len(pool), {}
    for split in splits:
        if getattr(source, split) is not None:
            sizes[split] = _count(getattr(source, split), total, total - sum(sizes.values()), split, source)
    rest, unsized = total - sum(sizes.values()), [s for s in splits if s not in sizes]
    for i, split in enumerate(unsized):
        sizes[split] = rest // len(unsized) + (0 if i else rest % len(unsized))
    shares = [getattr(source, s) for s in splits]
    if all(isinstance(s, float) and s < 1 for s in shares) and abs(sum(shares) - 1) < 1e-9:
        sizes[splits[-1]] += total - sum(sizes.values())  # the rows that rounding down left over
    cut, start = {}, 0
    for split in splits:
        if sizes[split] < 1:
            raise RecipeError(f"dataset '{source.path}' has {total} rows: none is left for {split}.")
        cut[split] = pool.select(range(start, start + sizes[split]))
        start += sizes[split]
    return cut


def _count(size: int | float | None, total: int, left: int, split: str, source: Dataset) -> int:
    """The number of rows of a split whose size is a count, a share of `total`, or None for all that are left."""
    if size is None:
        return left
    count = int(total * size) if size < 1 else int(size)
    if size < 1 and count < 1:
        raise RecipeError(
            f"dataset '{source.path}' has {total} rows, too few for a {split} split of {size:g} of them: {split} would "
            "be empty."
        )
    if count > left or count < 1:
        raise RecipeError(
            f"dataset '{source.path}' has {total} rows, {left} of them left for {split}, and dataset.{split} asks for "
            f"{size:g}. Set fewer rows or a share: --set dataset.{split}={0.2 if split != 'train' else 0.7}."
        )
    return count


def _with_ids(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    if not len(rows):
        raise RecipeError(f"The dataset's split '{split}' is empty: it has no rows.")
    if "id" in rows.column_names:
        rows = rows.remove_columns("id")
    return rows.add_column("id", [f"{split}-{i}" for i in range(len(rows))])


def _shuffled(rows: datasets.Dataset, source: Dataset) -> datasets.Dataset:
    """The rows in random order, and with `source.balance` as many of each class."""
    rows = rows.shuffle(seed=source.seed)
    if not source.balance:
        return rows
    if source.label not in rows.column_names:
        raise RecipeError(missing_column(source.label, "label", rows.column_names, source.path))
    by_class: dict[object, list[int]] = {}
    for i, label in enumerate(rows[source.label]):
        if isinstance(label, list):
            raise RecipeError(
                f"dataset '{source.path}': dataset.balance needs one class per example; '{source.label}' holds lists."
            )
        by_class.setdefault(label, []).append(i)
    smallest = min(len(indices) for indices in by_class.values())
    # Shuffled again, as the kept rows of a common class come before the last ones of a rare class.
    return rows.select([i for indices in by_class.values() for i in indices[:smallest]]).shuffle(seed=source.seed)


def missing_column(column: str, key: str, columns: list[str], path: str) -> str:
    """The message for a missing column: the nearest, all that exist, and how to name another."""
    names = [name for name in columns if name != "id"]
    return (
        f"dataset '{path}' has no column '{column}'.{nearest(column, names)} It has: {', '.join(names)}. "
        f"Name the right one with --set dataset.{key}=COLUMN."
    )


def _read(source: Dataset) -> dict[str, datasets.Dataset]:
    if source.path.startswith(EMBEDDED):
        from peft_recipes.embedded.stand_ins import dataset

        return dict(dataset(source.path.removeprefix(EMBEDDED)))
    path = Path(source.path).expanduser()
    if path.suffix in READERS and not path.is_dir():
        return read_file(path)
    import datasets

    if is_local(source.path):
        if not path.is_dir():
            kinds = ", ".join(sorted(READERS))
            raise RecipeError(f"dataset '{source.path}' is not there, or is no {kinds} file and no folder of them.")
        for file in sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file()):
            _check_lines(file)
    with hub_errors("dataset", source.path):
        name = str(path) if path.is_dir() else source.path
        try:
            return dict(datasets.load_dataset(name, source.name, revision=source.revision))
        except datasets.exceptions.DatasetGenerationError as error:
            raise RecipeError(f"dataset '{source.path}' can't be read: {_root_cause(error)}") from error


def read_file(path: Path) -> dict[str, datasets.Dataset]:
    """Read a csv, tsv, json, jsonl or parquet file. Raises RecipeError: a missing or empty file, a broken line."""
    import datasets

    if not path.is_file():
        raise RecipeError(f"dataset file {path} is not there.")
    if path.stat().st_size == 0:
        raise RecipeError(f"dataset file {path} is empty.")
    _check_lines(path)
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        return dict(datasets.load_dataset(READERS[path.suffix], data_files=str(path), **options))
    except Exception as error:  # datasets wraps what its readers raise
        raise RecipeError(f"dataset file {path} can't be read: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{' '.join(str(error).split())[:300] or type(error).__name__}."


def _check_lines(path: Path) -> None:
    """Raise RecipeError with the broken line of a text file, which the readers of datasets do not name."""
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip() and not isinstance(json.loads(line), dict):
                        raise RecipeError(f"{path}, line {number}: expected a JSON object.")
        elif path.suffix in (".csv", ".tsv"):
            _check_csv(path)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno}).") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}).") from error


def _check_csv(path: Path) -> None:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        start = 1
        try:
            header = next(rows, [])
            first = start = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(header):
                    raise RecipeError(
                        f"{path}, line {start}: {len(row)} values where the header has {len(header)} "
                        f"({', '.join(header)}). A value with a comma or a line break in it needs quotes."
                    )
                start = rows.line_num + 1
            if start == first:
                raise RecipeError(f"{path} is empty: it has a header and no rows.")
        except csv.Error as error:
            opened = f"line {start}: a quote that is opened here is never closed" if "end of data" in str(error) else ""
            raise RecipeError(f"{path}, {opened or f'line {rows.line_num}: {error}'}.") from error
