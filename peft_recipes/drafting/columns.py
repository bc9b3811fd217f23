"""What the columns of a dataset hold, from their first rows: texts, messages, images, labels, numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAMPLE = 1_000  # rows that are looked at
IMAGE, MESSAGES, SPANS, LIST, TEXT, NUMBER, WHOLE, BOOL, CLASS, OTHER = (
    "image", "messages", "spans", "list", "text", "number", "whole", "bool", "class", "other"
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One column: the kind of its values, how many differ, and the mean number of words of a text."""

    name: str
    kind: str
    values: list[Any]
    distinct: int
    words: float = 0.0

    @property
    def is_label(self) -> bool:
        """Whether its values could be classes: few of them, each on several rows."""
        if self.kind in (CLASS, BOOL):
            return True
        few = self.distinct <= max(2, min(200, len(self.values) // 3))
        return few and (self.kind == WHOLE or (self.kind == TEXT and self.words <= 4))


def columns_of(rows: Any) -> dict[str, Column]:
    """The columns of a split, by name; `id`, which the reader adds, is left out."""
    sample = rows.select(range(min(SAMPLE, len(rows))))
    return {name: _column(name, sample) for name in rows.column_names if name != "id"}


def _column(name: str, rows: Any) -> Column:
    feature = type(rows.features[name]).__name__
    if feature == "Image":
        return Column(name, IMAGE, [], 0)
    values = [value for value in rows[name] if value is not None]
    kind = CLASS if feature == "ClassLabel" else _kind(values)
    texts = [value for value in values if isinstance(value, str)]
    words = sum(len(text.split()) for text in texts) / len(texts) if texts else 0.0
    return Column(name, kind, values, len({repr(value) for value in values}), words)


def _kind(values: list[Any]) -> str:
    first = next((value for value in values if value not in ([], "")), values[0] if values else None)
    if isinstance(first, list):
        inner = first[0] if first else None
        if isinstance(inner, dict):
            return MESSAGES if {"role", "from"} & set(inner) else SPANS if _has_span(inner) else OTHER
        return LIST if isinstance(inner, (str, int)) else OTHER
    if isinstance(first, dict):
        return SPANS if _has_span(first) else OTHER
    if isinstance(first, bool):
        return BOOL
    if isinstance(first, (int, float)):
        return WHOLE if all(float(value).is_integer() for value in values) else NUMBER
    return _kind_of_texts(values) if isinstance(first, str) else OTHER


def _kind_of_texts(values: list[Any]) -> str:
    """The kind of texts, which in a csv may be numbers or true and false."""
    words = {value.strip().lower() for value in values if isinstance(value, str) and value.strip()}
    if not words:
        return OTHER
    if words <= {"true", "false"}:
        return BOOL
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return TEXT
    return WHOLE if all(number.is_integer() for number in numbers) else NUMBER


def _has_span(value: dict[str, Any]) -> bool:
    return bool({"start", "start_offset"} & set(value)) and bool({"end", "end_offset"} & set(value))
