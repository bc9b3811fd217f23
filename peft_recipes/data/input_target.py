"""Prompt and completion (input and target) of seq2seq examples, from the columns that datasets have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_recipes.data.formats import wrong_value
from peft_recipes.data.shapes import PAIRS, unused_note
from peft_recipes.data.skipped import SkippedRows
from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

# Pairs of columns, tried in this order; Alpaca's `input` is appended to its instruction.
_DEFAULTS = ("prompt", "completion")
_ALPACA = ("instruction", "output")
_PAIRS = (_DEFAULTS, ("input", "target"), _ALPACA, ("source", "target"), *PAIRS)
_OF_FORMAT = {"prompt-completion": (_DEFAULTS,), "alpaca": (_ALPACA,)}


def input_target_rows(rows: datasets.Dataset, source: Dataset, skipped: SkippedRows) -> datasets.Dataset:
    """Rows with `id`, `prompt` and `completion` as text. Those without one of them go to `skipped`.

    Raises RecipeError: no such columns (with the nearest), a value that is not text, too many unusable rows.
    """
    import datasets

    columns = input_target_columns(rows.column_names, source)
    examples = []
    for row in rows:
        for column in columns:
            if not isinstance(row[column], (str, type(None))):
                raise wrong_value(source.path, row["id"], column, "expected text,", row[column])
        given, target = (row[column] or "" for column in columns)
        if columns == _ALPACA and str(row.get("input") or "").strip():
            given = f"{given}\n\n{row['input']}"
        if given.strip() and target.strip():
            examples.append({"id": row["id"], "prompt": given, "completion": target})
        else:
            skipped.add(row["id"], "an empty target" if given.strip() else "an empty input")
    skipped.check()
    return datasets.Dataset.from_list(examples)


def input_target_notes(columns: list[str], source: Dataset) -> list[str]:
    """A note on the columns that nothing reads, or none."""
    used = set(input_target_columns(columns, source))
    return unused_note(columns, used | ({"input"} if used == set(_ALPACA) else set()))


def input_target_columns(present: list[str], source: Dataset) -> tuple[str, str]:
    """The columns of input and target: those that the recipe names, or the first pair that exists."""
    named = (source.prompt, source.completion)
    if named != _DEFAULTS:
        for column, key in zip(named, ("prompt", "completion"), strict=True):
            if column not in present:
                raise RecipeError(missing_column(column, key, present, source.path))
        return named
    if source.format not in (None, *_OF_FORMAT):
        raise RecipeError(
            f"dataset.format: '{source.format}' has no input and target. Valid: {', '.join(_OF_FORMAT)}, or leave it "
            "out and name the columns in dataset.prompt and dataset.completion."
        )
    pairs = _OF_FORMAT.get(source.format, _PAIRS)
    for pair in pairs:
        if set(pair) <= set(present):
            return pair
    known = "; ".join(", ".join(pair) for pair in pairs[:4])
    raise RecipeError(
        f"dataset '{source.path}' has the columns {', '.join(c for c in present if c != 'id')}, which are none "
        f"of the pairs of input and target: {known}. Name yours with --set dataset.prompt=COLUMN "
        "--set dataset.completion=COLUMN."
    )
