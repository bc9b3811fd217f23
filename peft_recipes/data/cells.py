"""Labels in csv files: their cells are text, and a label column of numbers, or lists, is read as such."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft_recipes.data.columns import column_values
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.dataset import CLASSES, REGRESSION, Dataset

if TYPE_CHECKING:
    import datasets

# A number as a program writes it: 011 and +1 are names.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")


def typed(splits: dict[str, datasets.Dataset], source: Dataset) -> dict[str, datasets.Dataset]:
    """The splits of csv files with the label column as whole numbers or floats where all its cells are such numbers.

    So 0 and 1 are class numbers as in other formats, and 0.5 is a number to learn; 011, True and None are names. Lists,
    as JSON or as Python writes them, are the classes of a text. An empty cell among numbers or lists is None. Splits of
    other formats are unchanged.
    Raises RecipeError for a column of fractions with a cell that is no number.
    """
    from datasets import Dataset as Rows

    labelled = {name: rows for name, rows in splits.items() if source.label in rows.column_names}
    texts = {name: rows for name, rows in labelled.items() if rows.info.builder_name == "csv"}
    if any(_is_text(rows, source.label) for name, rows in labelled.items() if name not in texts):
        return splits
    cells = {name: list(column_values(rows, source.label)) for name, rows in texts.items()}
    number = _type_of((cell for column in cells.values() for cell in column), source)
    if number is None:
        return splits
    changed = dict(splits)
    for name, rows in texts.items():
        values = [number(cell) if cell else None for cell in cells[name]]
        order = rows.column_names
        column = Rows.from_dict({source.label: values})
        changed[name] = _replaced(rows, column, order)
    return changed


def _replaced(rows: datasets.Dataset, column: datasets.Dataset, order: list[str]) -> datasets.Dataset:
    from datasets import concatenate_datasets

    others = rows.remove_columns(column.column_names)
    return concatenate_datasets([others, column], axis=1).select_columns(order)


def _is_text(rows: datasets.Dataset, column: str) -> bool:
    return "string" in str(getattr(rows.features[column], "dtype", ""))


def _type_of(cells: Iterable[str | None], source: Dataset) -> Any:
    """What makes a value of a cell: a whole number, a float or a list. None for text."""
    values = {cell for cell in cells if cell}
    if not values or set(source.labels or ()) & values:
        return None
    if source.problem_type == REGRESSION:
        return float if all(map(_is_float, values)) else None
    if all(map(_WHOLE.fullmatch, values)):
        return lambda cell: int(cell.partition(".")[0])
    if source.problem_type != CLASSES and all(_list_of(cell) is not None for cell in values):
        return _list_of
    if source.problem_type == CLASSES or source.labels:
        return None
    numbers = [cell for cell in values if _NUMBER.fullmatch(cell)]
    if len(numbers) == len(values):
        return float
    fractions = sum(_WHOLE.fullmatch(cell) is None for cell in numbers)
    if fractions > len(values) / 2:
        other = min(values.difference(numbers))
        raise RecipeError(
            f"dataset '{source.path}', column '{source.label}': its cells are numbers, and one is '{other}'. To learn "
            f"the numbers, correct or remove such rows; for classes add --set dataset.problem_type={CLASSES}."
        )
    return None


def _list_of(cell: str) -> list[Any] | None:
    if not cell.lstrip().startswith("["):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) else None
    return None


def _is_float(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
