"""Classes and labels of raw rows, the prompt of a base without a chat template, overlap between splits."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from peft_recipes.data.columns import column_values
from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

# The prompt of the Alpaca project, for a base whose tokenizer has no chat template.
PLAIN_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"


def class_labels(splits: dict[str, datasets.Dataset], source: Dataset) -> list[str]:
    """The class names in the order of their numbers, from the data or from `source.labels`.

    Raises RecipeError: no label column, a label that is neither a whole number nor text, names that don't agree.
    """
    from datasets import ClassLabel

    train = splits["train"]
    if source.label not in train.column_names:
        raise RecipeError(missing_column(source.label, "label", train.column_names, source.path))
    feature = train.features[source.label]
    if isinstance(feature, ClassLabel):
        if source.labels and [n.lower() for n in source.labels] != [n.lower() for n in feature.names]:
            raise RecipeError(
                f"dataset '{source.path}' names its classes {', '.join(feature.names)}; dataset.labels says "
                f"{', '.join(source.labels)}. Leave it out: --set dataset.labels=null."
            )
        return list(source.labels or feature.names)
    first_row: dict[int | str, str] = {}
    for rows in splits.values():
        for row, value in zip(column_values(rows, "id"), column_values(rows, source.label), strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
                raise wrong_value(source.path, row, source.label, "a label is a whole number or text,", value)
            first_row.setdefault(value, row)
    if source.labels:
        for value, row in first_row.items():
            if class_index(value, source.labels) is None:
                raise RecipeError(
                    f"dataset '{source.path}', row {row}: label {value!r} is not one of dataset.labels: "
                    f"{', '.join(source.labels)}."
                )
        return list(source.labels)
    if all(isinstance(value, int) for value in first_row):
        lowest, highest = min(first_row), max(first_row)
        if lowest < 0 or highest > 9_999:
            raise RecipeError(f"dataset '{source.path}': labels run from {lowest} to {highest}; expected 0, 1, ...")
        return [str(i) for i in sorted(first_row)]
    return sorted(str(value) for value in first_row)


def class_index(value: Any, labels: list[str]) -> int | None:
    """The index of a label: by its name, or the label itself where the names are not numbers."""
    if str(value) in labels:
        return labels.index(str(value))
    is_index = isinstance(value, int) and not all(label.isdigit() for label in labels)
    return value if is_index and 0 <= value < len(labels) else None


def classification_rows(rows: datasets.Dataset, source: Dataset, column: str, labels: list[str]) -> datasets.Dataset:
    """Rows with exactly `id`, `column` ("text" or "image") and `label` (a number). Raises RecipeError with the row."""
    from datasets import ClassLabel

    name = getattr(source, column)
    if name not in rows.column_names:
        raise RecipeError(missing_column(name, column, rows.column_names, source.path))
    are_indices = isinstance(rows.features[source.label], ClassLabel)
    indices = [value if are_indices else class_index(value, labels) for value in column_values(rows, source.label)]
    for row, index in zip(column_values(rows, "id"), indices, strict=True):
        if index is None or not 0 <= index < len(labels):
            raise RecipeError(
                f"dataset '{source.path}', row {row}: label {index} is outside 0 to {len(labels) - 1} "
                f"({', '.join(labels)})."
            )
    if column == "text":
        check_text(rows, name, source.path)
    return _only(rows, name, column).add_column("label", indices)


def check_text(rows: datasets.Dataset, column: str, path: str) -> None:
    """Raise RecipeError for the first value of a column that is not text, with its row."""
    for row, value in zip(column_values(rows, "id"), column_values(rows, column), strict=True):
        if not isinstance(value, str):
            raise wrong_value(path, row, column, "expected text,", value)


def wrong_value(path: str, row: str, column: str, expected: str, value: Any) -> RecipeError:
    """The error for a value of the wrong type. expected: "expected text,"."""
    return RecipeError(f"dataset '{path}', row {row}, column '{column}': {expected} got {value!r} "
                       f"({type(value).__name__}).")  # fmt: skip


def _only(rows: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    """The rows with `id` and one column alone, under another name."""
    rows = rows.select_columns(["id", column])
    return rows.rename_column(column, name) if column != name else rows


def plain_prompt(text: str) -> str:
    """The prompt of a base without a chat template."""
    return PLAIN_PROMPT.format(prompt=text)


def plain_conversation(messages: list[dict[str, Any]], row: str, source: Dataset) -> str:
    """The prompt of a base without a chat template, from one message of the user, after the system's if there is one.

    Raises RecipeError for several turns, whose roles would be lost.
    """
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise needs_template("several turns" if len(roles) > 1 else f"a prompt of the role '{roles[0]}'", row, source)
    return plain_prompt(as_text(messages))


def needs_template(what: str, row: str, source: Dataset) -> RecipeError:
    """The error for a row that can't be trained on without a chat template. what: "several turns"."""
    return RecipeError(
        f"dataset '{source.path}', row {row}: it has {what}, and the base's tokenizer has no chat template. Give one: "
        "--set dataset.chat_template=chatml (or a file with a Jinja template)."
    )


def as_text(value: str | list[dict[str, str]]) -> str:
    """A text, or the contents of messages one below the other."""
    return value if isinstance(value, str) else "\n\n".join(message["content"] for message in value)


def without_test_examples(
    splits: dict[str, datasets.Dataset], columns: list[str]
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Remove the examples that stand in two splits, by the content of `columns`; return the splits and notes.

    An example of the test split is removed from validation, train and pretrain; one of validation from train and
    pretrain. A further evaluation set loses the examples that are left in train, validation and pretrain: what is
    trained on stays the same, whichever sets are evaluated. Images are compared by their decoded pixels, before any
    transform. IMDB has 123 texts in both train and test, SMS spam 403 exact repeats.
    Raises RecipeError if nothing is left of a split.
    """
    keys = {name: content_keys(rows, columns) for name, rows in splits.items()}
    kept = dict(splits)

    def remove(name: str, others: tuple[str, ...]) -> int:
        present = set().union(*(keys[other] for other in others if other in keys))
        remaining = [i for i, key in enumerate(keys[name]) if key not in present]
        removed = len(keys[name]) - len(remaining)
        if removed and not remaining:
            names = ", ".join(other for other in others if other in keys)
            raise RecipeError(
                f"Every example of '{name}' is also in another split ({names}); nothing is left. Name other rows, or "
                "set skip_checks: [duplicates]."
            )
        if removed:
            kept[name], keys[name] = kept[name].select(remaining), [keys[name][i] for i in remaining]
        return removed

    own = {"validation": ("test",), "train": ("test", "validation"), "pretrain": ("test", "validation")}
    notes = []
    if dropped := sum(remove(name, later) for name, later in own.items() if name in splits):
        notes.append(f"{dropped} examples that also occur in a later split were left out.")
    for name in splits:
        if name not in own and name != "test" and (dropped := remove(name, tuple(own))):
            notes.append(f"{dropped} examples of evaluate_also.{name} are also trained on and were left out of it.")
    return kept, notes


def content_keys(rows: datasets.Dataset, columns: list[str]) -> list[str]:
    """A key per row that is equal where the columns are; a missing column (a set of plain text) counts as None."""
    present = [column for column in columns if column in rows.column_names]
    values = zip(*(column_values(rows, c) if c in present else [None] * len(rows) for c in columns), strict=True)
    return [json.dumps([_content(value) for value in row], sort_keys=True) for row in values]


def _content(value: Any) -> Any:
    """The value, or for an image its size, mode and a hash of its pixels: images of other sizes can share bytes."""
    if not hasattr(value, "tobytes"):
        return value
    image = value.convert("RGB") if value.mode == "P" else value  # a palette's order is no content
    return [image.mode, *image.size, _hashable(image)]


def fingerprint(splits: dict[str, datasets.Dataset]) -> str:
    """A hash of the examples of all splits, as 16 hex digits; independent of paths, times and caches."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"\n{name}:{len(splits[name])}".encode())
        for row in splits[name]:
            values = {key: _hashable(value) for key, value in row.items()}
            digest.update(json.dumps(values, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def _hashable(value: Any) -> Any:
    # An image is decoded to PIL: its pixels count, not how the file was compressed.
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else value
