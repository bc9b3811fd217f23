"""Tagged sentences: CoNLL's columns of tokens and tags, or a text with spans of characters, as words with tags.

Spans become BIO tags over the words of their text. A span that begins or ends inside a word tags the complete word.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peft_recipes.data.columns import column_values
from peft_recipes.data.shapes import unused_note
from peft_recipes.data.sources import missing_column
from peft_recipes.data.words import spaces_of, words_of
from peft_recipes.errors import RecipeError, unknown

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

OUTSIDE = "O"
# Tried in this order where the recipe names no column of its own.
_TOKEN_COLUMNS = ("tokens", "words", "text")
_TEXT_COLUMNS = ("text", "sentence", "content")
_TAG_COLUMNS = ("ner_tags", "tags", "spans", "entities", "label", "labels")
# The names of a span's parts: spaCy's and Label Studio's, doccano's.
_START, _END, _LABEL = ("start", "start_offset"), ("end", "end_offset"), ("label", "labels")
_PREFIXED = re.compile(r"([BIESLU])-(.+)", re.DOTALL)


def tagged_splits(
    splits: dict[str, datasets.Dataset], source: Dataset
) -> tuple[dict[str, datasets.Dataset], list[str], list[str]]:
    """Turn raw splits into rows of `id`, `words`, `spaces` (before each word) and `tags` (numbers).

    Returns them with the names of the tags in the order of their numbers, and notes. Sentences without a word are left
    out. Raises RecipeError, with the row: tokens and tags of unequal number, an unknown tag, spans outside of their
    text, empty or overlapping, a value of another type.
    """
    if source.balance:
        raise RecipeError("dataset.balance: a sentence has many tags, not one class to balance. Leave it out.")
    read, widened = {}, []
    for name, rows in splits.items():
        read[name] = [row for row in _read(rows, source, widened) if row["words"]]
        if not read[name]:
            raise RecipeError(f"dataset '{source.path}': no sentence of its {name} split has a word.")
    labels = _names(read, splits["train"], source)
    notes = [f"{len(widened)} spans begin or end inside a word: their complete words are tagged."] if widened else []
    if empty := sum(map(len, splits.values())) - sum(map(len, read.values())):
        notes.append(f"{empty} sentences without a word were left out.")
    notes += unused_note(splits["train"].column_names, set(_columns(splits["train"], source)))
    return {name: _numbered(rows, labels, source) for name, rows in read.items()}, labels, notes


def entity_tags(labels: Sequence[str]) -> list[str] | None:
    """The tags as seqeval reads them (B-X, I-X, E-X, S-X, O); None for tags that mark no entities (parts of speech).

    BILOU's L- and U- are BIOES's E- and S-. A tag without a prefix ("person" next to "O") is an I- tag.
    """
    if not are_tags(labels):
        return None
    return [label if label == OUTSIDE else "-".join(_parts(label)) for label in labels]


def are_tags(labels: Sequence[str]) -> bool:
    """Whether names are tags (O, B-PER) rather than the types of spans (PER)."""
    return any(label == OUTSIDE or _PREFIXED.fullmatch(label) for label in labels)


def span_tags(types: Sequence[str]) -> list[str]:
    """The BIO tags of the types of spans."""
    return [OUTSIDE, *(f"{prefix}-{label}" for label in types for prefix in "BI")]


def _parts(label: str) -> tuple[str, str]:
    match = _PREFIXED.fullmatch(label)
    return ({"L": "E", "U": "S"}.get(match[1], match[1]), match[2]) if match else ("I", label)


def _read(rows: datasets.Dataset, source: Dataset, widened: list[str]) -> Iterator[dict[str, Any]]:
    """Yield id, words, spaces and tags (names, or numbers) of each row. widened: gets the row of each such span."""
    text, tags = _columns(rows, source)
    numbered = _class_names(rows.features[tags])
    for row, given, marks in zip(
        column_values(rows, "id"), column_values(rows, text), column_values(rows, tags), strict=True
    ):
        where = f"dataset '{source.path}', row {row}"
        if isinstance(given, str) and (marks is None or isinstance(marks, dict) or _is_list_of(marks, dict)):
            spans = _bounds(text, given, marks, where)
            words, found = words_of(given), []
            for start, end, label in spans:
                found.append(([i for i, (a, b) in enumerate(words) if a < end and b > start], label))
                covered = found[-1][0]
                if not covered:
                    raise RecipeError(f"{where}: the span {start} to {end} ({label}) covers no word.")
                if words[covered[0]][0] < start or words[covered[-1]][1] > end:
                    widened.append(row)
            yield {
                "id": row,
                "words": [given[a:b] for a, b in words],
                "spaces": spaces_of(given, words),
                "tags": _bio(found, len(words), where),
            }
            continue
        if not (_is_list_of(given, str) and (_is_list_of(marks, str) or _is_list_of(marks, int))):
            raise RecipeError(
                f"{where}: expected a list of tokens in '{text}' and a list of tags in '{tags}', or a text and a list "
                f"of spans {{start, end, label}}; got {_shown(given)} and {_shown(marks)}. In csv files lists are "
                "text: use jsonl or parquet."
            )
        if len(given) != len(marks):
            raise RecipeError(
                f"{where}: {len(given)} tokens in '{text}' and {len(marks)} tags in '{tags}'. Each token needs one tag."
            )
        names = [_class_name(mark, numbered, where) for mark in marks] if numbered else list(marks)
        yield {"id": row, "words": list(given), "spaces": [i > 0 for i in range(len(given))], "tags": names}


def _columns(rows: datasets.Dataset, source: Dataset) -> tuple[str, str]:
    """The columns of the words or text, and of the tags or spans: those that the recipe names, or the usual ones."""

    def first(named: str, default: str, usual: Iterable[str], key: str) -> str:
        known = [named] if named != default or named in rows.column_names else list(usual)
        found = next((name for name in known if name in rows.column_names), None)
        if found is None:
            name = named if named != default else known[0]
            raise RecipeError(missing_column(name, key, rows.column_names, source.path))
        return found

    tags = first(source.label, "label", _TAG_COLUMNS, "label")
    spans = _holds_spans(rows.features[tags])
    if source.text == "text" and not spans:
        return first("", "", _TOKEN_COLUMNS, "text"), tags
    return first(source.text, "text", _TEXT_COLUMNS, "text"), tags


def _holds_spans(feature: Any) -> bool:
    return isinstance(feature, dict) or isinstance(getattr(feature, "feature", feature), dict)


def _class_names(feature: Any) -> list[str] | None:
    """The names of tags that are stored as numbers with names (ClassLabel)."""
    return getattr(getattr(feature, "feature", None), "names", None)


def _class_name(number: int, names: list[str], where: str) -> str:
    if not 0 <= number < len(names):
        raise RecipeError(f"{where}: tag {number} is outside 0 to {len(names) - 1} ({', '.join(names)}).")
    return names[number]


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _bounds(column: str, text: str, spans: Any, where: str) -> list[tuple[int, int, str]]:
    """Start, end and label of each span of a text, sorted; checked to be inside of it and not to overlap."""
    if isinstance(spans, dict):  # how datasets stores a sequence of records: a list of each field
        spans = [dict(zip(spans, values, strict=True)) for values in zip(*spans.values(), strict=True)]
    found = []
    for span in spans or []:
        start, end, label = (_part(span, names, where) for names in (_START, _END, _LABEL))
        if isinstance(label, list) and len(label) == 1:
            label = label[0]
        if not (isinstance(start, int) and isinstance(end, int) and isinstance(label, str) and label):
            raise RecipeError(f"{where}: expected whole numbers and a label in a span, got {_shown(span)}.")
        if not 0 <= start <= end <= len(text):
            raise RecipeError(f"{where}: the span {start} to {end} ({label}) is outside of '{column}', which has "
                              f"{len(text)} characters.")  # fmt: skip
        found.append((start, end, label))
    found.sort()
    for (start, end, label), (next_start, next_end, next_label) in itertools.pairwise(found):
        if next_start < end:
            raise RecipeError(
                f"{where}: the spans {start} to {end} ({label}) and {next_start} to {next_end} ({next_label}) overlap, "
                "which one tag a word can't express. Keep one of them."
            )
    return found


def _part(span: Any, names: tuple[str, ...], where: str) -> Any:
    value = next((span[name] for name in names if span.get(name) is not None), None) if isinstance(span, dict) else None
    if value is None:
        raise RecipeError(f"{where}: a span needs start, end and label, got {_shown(span)}.")
    return value


def _bio(spans: list[tuple[list[int], str]], count: int, where: str) -> list[str]:
    """BIO tags of `count` words. spans: the indices of each span's words, and its label."""
    tags = [OUTSIDE] * count
    for words, label in spans:
        if tags[words[0]] != OUTSIDE:
            raise RecipeError(f"{where}: two spans share a word, which one tag a word can't express. Keep one of them.")
        for i in words:
            tags[i] = f"{'B' if i == words[0] else 'I'}-{label}"
    return tags


def _names(read: dict[str, list[dict[str, Any]]], train: datasets.Dataset, source: Dataset) -> list[str]:
    """The names of all tags in the order of their numbers: the data's, dataset.labels, or those found, sorted."""
    feature = train.features[_columns(train, source)[1]]
    if names := _class_names(feature):
        if source.labels and [n.lower() for n in source.labels] != [n.lower() for n in names]:
            raise RecipeError(
                f"dataset '{source.path}' names its tags {', '.join(names)}; dataset.labels says "
                f"{', '.join(source.labels)}. Leave it out: --set dataset.labels=null."
            )
        return list(names)
    if source.labels:
        types = _holds_spans(feature) and not are_tags(source.labels)
        return span_tags(source.labels) if types else list(source.labels)
    found = {tag for rows in read.values() for row in rows for tag in row["tags"]}
    if any(isinstance(tag, int) for tag in found):
        raise RecipeError(
            f"dataset '{source.path}': its tags are numbers without names. Name them in order: "
            "--set dataset.labels=[O,B-PER,I-PER]."
        )
    if _holds_spans(feature):  # a type whose spans are all one word long still gets its I- tag
        found |= {f"I-{_parts(tag)[1]}" for tag in found if tag != OUTSIDE} | {OUTSIDE}
    return sorted(found, key=lambda tag: (tag != OUTSIDE, _parts(tag)[1], "BIESLU".find(tag[0])))


def _numbered(rows: list[dict[str, Any]], labels: list[str], source: Dataset) -> datasets.Dataset:
    import datasets

    numbers = {label: i for i, label in enumerate(labels)}
    for row in rows:
        for tag in row["tags"]:
            if isinstance(tag, int) and not 0 <= tag < len(labels):
                raise RecipeError(
                    f"dataset '{source.path}', row {row['id']}: tag {tag} is outside 0 to {len(labels) - 1} "
                    f"({', '.join(labels)})."
                )
            if isinstance(tag, str) and tag not in numbers:
                raise RecipeError(unknown("tag", tag, labels, f"dataset '{source.path}', row {row['id']}"))
        row["tags"] = [tag if isinstance(tag, int) else numbers[tag] for tag in row["tags"]]
    return datasets.Dataset.from_list(rows)
