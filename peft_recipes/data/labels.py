"""Labels of texts: one class, several classes or a number, by the data or by `dataset.problem_type`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_recipes.data import formats, mixing
from peft_recipes.data.columns import column_values
from peft_recipes.data.packing import IGNORED
from peft_recipes.data.skipped import SkippedRows
from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.dataset import CLASSES, MULTI_LABEL, REGRESSION, Dataset

if TYPE_CHECKING:
    import datasets

NO_TEXT = "no text"
_FOUND = {
    MULTI_LABEL: "hold lists: each text may have several classes (multi_label_classification)",
    REGRESSION: "are numbers that are no class ids: the model learns the number itself (regression)",
}


@dataclass(frozen=True)
class Labels:
    """What the labels of a dataset are.

    problem_type: one of `recipe.dataset.PROBLEM_TYPES`. names: of the classes in order; None for numbers. notes: says
    which problem type was found in the data, unless it is one class per text.
    """

    problem_type: str
    names: list[str] | None
    notes: list[str] = field(default_factory=list)


def labelled_texts(
    splits: dict[str, datasets.Dataset],
    source: Dataset,
    skipped_of: Callable[[str, datasets.Dataset], SkippedRows] | None = None,
) -> tuple[dict[str, datasets.Dataset], Labels]:
    """Return the splits with the columns `id`, `text`, `text_pair` (of pairs alone) and `label`, and what labels are.

    A label becomes a class id, a list of class ids in ascending order, or a float. skipped_of: gives what counts the
    rows of a split that are left out, those without a text; None: they are kept. Raises RecipeError with the row of a
    wrong label or text.
    """
    columns = source.text_columns
    for name, rows in splits.items():
        _check_columns(name, rows, source)
    if skipped_of is not None:
        splits = {name: _with_text(rows, columns, skipped_of(name, rows)) for name, rows in splits.items()}
    splits = {name: _named_truth(rows, source.label) for name, rows in splits.items()}
    problem_type = source.problem_type or _found(splits["train"], source.label)
    named = source.problem_type or problem_type == CLASSES
    notes = [] if named else [f"The labels in the column '{source.label}' {_FOUND[problem_type]}."]
    names, values = _LABELS[problem_type](splits, source)
    notes += _alike(names or [])
    texts = {name: _texts(rows, columns, values[name], source.path) for name, rows in splits.items()}
    return texts, Labels(problem_type, names, notes)


def _with_text(rows: datasets.Dataset, columns: list[str], skipped: SkippedRows) -> datasets.Dataset:
    """The rows that have a text, of a pair at least one. Raises RecipeError where too many have none."""
    kept = []
    for i, texts in enumerate(zip(*(column_values(rows, column) for column in columns), strict=True)):
        if all(text is None or (isinstance(text, str) and not text.strip()) for text in texts):
            skipped.add(rows[i]["id"], NO_TEXT)
        else:
            kept.append(i)
    skipped.check()
    return rows.select(kept) if len(kept) < len(rows) else rows


def _named_truth(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Labels that are true or false as the classes True and False, which a csv file has as well."""
    from datasets import Value

    if getattr(rows.features[column], "dtype", "") != "bool":
        return rows
    names = [None if value is None else str(value) for value in column_values(rows, column)]
    return rows.remove_columns(column).add_column(column, names, feature=Value("string"))


def _alike(names: list[str]) -> list[str]:
    """A note on classes that differ in case or blanks alone, or none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(" ".join(name.lower().split()), []).append(name)
    found = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    return (
        [f"Classes that differ in case or blanks alone: {'; '.join(found)}. Each is one of its own."] if found else []
    )


def same_labels(found: Sequence[Labels], names: Sequence[str]) -> Labels:
    """The labels that several datasets have alike. names: of the datasets. Raises RecipeError where they differ."""
    if len(found) > 1:
        mixing.agreed([labels.problem_type for labels in found], names, "problem types")
        mixing.agreed([labels.names for labels in found], names, "labels")
    return found[0]


def _check_columns(split: str, rows: datasets.Dataset, source: Dataset) -> None:
    """Raise RecipeError for a missing column, and for a split whose labels are all -1: GLUE's test splits have none."""
    columns, names = source.text_columns, rows.column_names
    for column in columns:
        if column not in names:
            message = missing_column(column, "text", names, source.path)
            pair = "dataset.text=[FIRST,SECOND]"
            raise RecipeError(message.replace("dataset.text=COLUMN", pair) if len(columns) > 1 else message)
    if source.label not in names:
        raise RecipeError(missing_column(source.label, "label", names, source.path))
    if len(rows) > 1 and all(value == -1 for value in column_values(rows, source.label)):
        raise RecipeError(
            f"dataset '{source.path}': every label of its {split} split is -1, so it has no labels (GLUE's test splits "
            f"have none). Name another one: --set dataset.{split}_split=validation, or cut it from train: "
            f"--set dataset.{split}_split={source.train_split}."
        )


def _found(train: datasets.Dataset, column: str) -> str:
    """The problem type of a column: lists are several classes, fractions are numbers, all else is one class."""
    from datasets import List

    feature = train.features[column]
    if isinstance(feature, (list, List)) or type(feature).__name__ in ("Sequence", "LargeList"):
        return MULTI_LABEL
    return REGRESSION if _is_float(train, column) and not _is_whole(train[column]) else CLASSES


def _is_float(rows: datasets.Dataset, column: str) -> bool:
    return column in rows.column_names and str(getattr(rows.features[column], "dtype", "")).startswith("float")


def _is_whole(values: Iterable[float | None]) -> bool:
    return all(value is None or float(value).is_integer() for value in values)


Splits = dict[str, "datasets.Dataset"]
Values = dict[str, list[Any]]  # the labels of each split


def _one_class(splits: Splits, source: Dataset) -> tuple[list[str], Values]:
    splits = {name: _whole_numbers(rows, source.label) for name, rows in splits.items()}
    names = formats.class_labels(splits, source)
    first = dataclasses.replace(source, text=source.text_columns[0])
    made = {name: formats.classification_rows(rows, first, "text", names) for name, rows in splits.items()}
    return names, {name: list(column_values(rows, "label")) for name, rows in made.items()}


def _several_classes(splits: Splits, source: Dataset) -> tuple[list[str], Values]:
    names = _several_names(splits, source)
    return names, {
        name: [_ids(row, names, source) for row in _pairs(rows, source.label)] for name, rows in splits.items()
    }


def _numbers(splits: Splits, source: Dataset) -> tuple[None, Values]:
    return None, {name: [_number(row, source) for row in _pairs(rows, source.label)] for name, rows in splits.items()}


_LABELS = {CLASSES: _one_class, MULTI_LABEL: _several_classes, REGRESSION: _numbers}


def _whole_numbers(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Class ids that were read as floats (a csv with an empty cell) as whole numbers."""
    from datasets import Value

    are_ids = _is_float(rows, column) and _is_whole(rows[column])
    return rows.cast_column(column, Value("int64")) if are_ids else rows


def _pairs(rows: datasets.Dataset, column: str) -> list[tuple[str, Any]]:
    """The id and the label of each row."""
    return list(zip(column_values(rows, "id"), column_values(rows, column), strict=True))


def _several_names(splits: dict[str, datasets.Dataset], source: Dataset) -> list[str]:
    """The class names of lists of labels: of the feature, of `source.labels`, or all that occur."""
    feature = getattr(splits["train"].features[source.label], "feature", None)
    if names := getattr(feature, "names", None):
        if source.labels and [n.lower() for n in source.labels] != [n.lower() for n in names]:
            raise RecipeError(
                f"dataset '{source.path}' names its classes {', '.join(names)}; dataset.labels says "
                f"{', '.join(source.labels)}. Leave it out: --set dataset.labels=null."
            )
        return list(names)
    values: set[Any] = set()
    for rows in splits.values():
        for row, labels in _pairs(rows, source.label):
            if not isinstance(labels, list) or not all(_is_label(value) for value in labels):
                expected = "a label is a list of class names or numbers,"
                raise formats.wrong_value(source.path, row, source.label, expected, labels)
            values |= set(labels)
    if source.labels:
        return list(source.labels)
    if len({type(value) for value in values}) > 1:
        raise RecipeError(f"dataset '{source.path}', column '{source.label}': class names and numbers are mixed.")
    return [str(value) for value in sorted(values)]


def _is_label(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool) and value != ""


def _ids(row: tuple[str, Any], names: list[str], source: Dataset) -> list[int]:
    """The class ids of a list of labels, ascending. Raises RecipeError for an unknown label or one named twice."""
    example, labels = row
    if labels is None:
        expected = "a label is a list (an empty one for no class),"
        raise formats.wrong_value(source.path, example, source.label, expected, labels)
    ids = [formats.class_index(value, names) for value in labels]
    where = f"dataset '{source.path}', row {example}"
    for value, index in zip(labels, ids, strict=True):
        if index is None:
            raise RecipeError(f"{where}: label {value!r} is not one of the classes: {', '.join(names)}.")
    if len(set(ids)) < len(ids):
        raise RecipeError(
            f"{where}: {labels} names a class twice. A list holds the classes of a text; if yours holds a 0 or 1 for "
            "each class, write the numbers of its ones instead."
        )
    return sorted(ids)


def _number(row: tuple[str, Any], source: Dataset) -> float:
    example, value = row
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise formats.wrong_value(source.path, example, source.label, "a label is a finite number,", value)
    if value == IGNORED:
        raise RecipeError(
            f"dataset '{source.path}', row {example}: transformers takes the label {IGNORED} for one to leave out. "
            "Shift or scale your labels."
        )
    return float(value)


def _texts(rows: datasets.Dataset, columns: list[str], labels: list[Any], path: str) -> datasets.Dataset:
    """Rows with exactly `id`, `text`, `text_pair` for a second column, and `label`."""
    for column in columns:
        formats.check_text(rows, column, path)
    renames = {column: name for column, name in zip(columns, ("text", "text_pair"), strict=False) if column != name}
    return rows.select_columns(["id", *columns]).rename_columns(renames).add_column("label", labels)
