"""The rows of a user's file as they are written, so that columns are added and nothing else of the file changes."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.data import files
from peft_recipes.errors import RecipeError

BOM = "\ufeff"
_OBJECT = re.compile(r"[^\s\[,\]]")  # the first character of a list's next element, or of the next line


@dataclass
class Table:
    """Rows of a file: their values by column, and the file's own text where it is kept.

    kind: "csv", "json" (objects, in a list or one a line) or "" for files whose text is not kept. parts: the text of
    the file cut behind each row, before what ends it (a line end, a closing brace), so that columns can be put there;
    one more part than rows. delimiter, quotes_all: of a csv file.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    kind: str = ""
    parts: list[str] = field(default_factory=list)
    delimiter: str = ","
    quotes_all: bool = False

    def values(self, column: str) -> list[Any]:
        """The values of a column; None where a row lacks it."""
        return [row.get(column) for row in self.rows]

    def text_columns(self) -> list[str]:
        """The columns that hold text and nothing else; empty values don't count."""
        found = []
        for name in self.columns:
            values = [value for value in self.values(name) if value is not None]
            if values and all(isinstance(value, str) for value in values):
                found.append(name)
        return found

    def with_columns(self, added: dict[str, list[Any]]) -> str:
        """The text of the file with further columns behind the others; None is an empty cell, or null."""
        if self.kind == "csv":
            texts = [self._cells(list(added)), *(self._cells(values) for values in zip(*added.values(), strict=True))]
        else:
            texts = []
            for row, values in zip(self.rows, zip(*added.values(), strict=True), strict=True):
                pairs = (f"{_json(name)}: {_json(value)}" for name, value in zip(added, values, strict=True))
                texts.append((", " if row else "") + ", ".join(pairs))
        return "".join(part + text for part, text in zip(self.parts, [*texts, ""], strict=True))

    def _cells(self, values: Sequence[Any]) -> str:
        line = io.StringIO()
        quoting = csv.QUOTE_ALL if self.quotes_all else csv.QUOTE_MINIMAL
        csv.writer(line, delimiter=self.delimiter, lineterminator="", quoting=quoting).writerow(
            ["", *map(cell, values)]
        )
        return line.getvalue().removeprefix('""')


def cell(value: Any) -> Any:
    """A value as a cell of a csv file: nothing for None, JSON for lists and mappings."""
    if isinstance(value, (list, dict)):
        return _json(value)
    return "" if value is None else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def read_table(path: Path) -> Table:
    """Read a file of rows. Raises RecipeError: a missing or empty file, a broken line."""
    files.check_file(path, "file")
    suffix, _ = files.suffixes_of(path)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path)
    if files.FORMATS[suffix] == "json":
        return _read_json(path)
    if suffix == ".txt":
        lines = _text(path).splitlines()
        rows = [{"text": line} for line in lines if line.strip()]
        if not rows:
            raise RecipeError(f"{path} is empty.")
        return Table(["text"], rows)
    from peft_recipes.data.sources import read_file

    made = read_file(path)["train"]
    return Table(made.column_names, made.to_list())


def _text(path: Path) -> str:
    with files.opened_text(path) as file:
        return file.read()


def has_bom(path: Path) -> bool:
    """Whether the file's text begins with a byte order mark."""
    with files.open_binary(path) as file:
        return file.read(3) == BOM.encode()


def _read_csv(path: Path) -> Table:
    taken: list[str] = []

    def kept(lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    rows: list[dict[str, Any]] = []
    parts = [""]
    with files.opened_text(path) as file:
        reader, names, delimiter = files.csv_reader(path, kept(iter(file)))
        header = "".join(taken)
        taken.clear()
        _append(parts, header)
        for values in reader:
            text = "".join(taken)
            taken.clear()
            if values:
                rows.append(dict(zip(names, values, strict=True)))
                _append(parts, text)
            else:
                parts[-1] += text  # an empty line
    parts[-1] += "".join(taken)
    if has_bom(path):
        parts[0] = BOM + parts[0]
    return Table(names, rows, "csv", parts, delimiter, quotes_all=header.startswith('"') and _all_quoted(header))


def _append(parts: list[str], record: str) -> None:
    """Cut a record before its line end: the next columns go there."""
    body = record.rstrip("\r\n")
    parts[-1] += body
    parts.append(record[len(body) :])


def _all_quoted(header: str) -> bool:
    return bool(re.fullmatch(r'("[^"]*"[,;\t]?)+', header.strip()))


def _read_json(path: Path) -> Table:
    text = _text(path)
    rows: list[dict[str, Any]] = []
    parts, decoder = [""], json.JSONDecoder()
    position = written = 0
    while found := _OBJECT.search(text, position):
        row, position = decoder.raw_decode(text, found.start())
        rows.append(row)
        inside = position - 1
        while text[inside - 1].isspace():
            inside -= 1
        parts[-1] += text[written:inside]
        parts.append("")
        written = inside
    parts[-1] += text[written:]
    if has_bom(path):
        parts[0] = BOM + parts[0]
    return Table(list(dict.fromkeys(key for row in rows for key in row)), rows, "json", parts)
