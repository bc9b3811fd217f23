"""Write rows with their results to a file: the user's own file with columns added, or rows in another format."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.inference.tables import Table, cell
from peft_recipes.runs.files import check_output

# The formats that are written, by suffix in lower case.
_WRITTEN = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}


def check_writable(path: Path) -> None:
    """Raise RecipeError, before any work, if `write_table` could not write there."""
    if path.suffix.lower() not in _WRITTEN:
        raise RecipeError(f"--output {path}: expected {', '.join(_WRITTEN)}.")
    if path.is_dir():
        raise RecipeError(f"--output {path} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"--output {path}: there is no folder {path.parent}.")
    check_output(path.absolute().parent)


def write_table(table: Table, added: dict[str, list[Any]], path: Path, source: Path | None = None) -> None:
    """Write rows with further columns, atomically. source: the file of the rows.

    Where the output has the format of `source`, what was in it stays byte for byte, and of parquet value for value.
    """
    suffix = path.suffix.lower()
    kind = _WRITTEN[suffix]
    with _written(path) as temporary:
        if source is not None and table.kind == kind and _same_lines(source, suffix):
            with temporary.open("w", encoding="utf-8", newline="") as file:
                file.write(table.with_columns(added))
        elif kind == "parquet":
            _write_parquet(table, added, temporary, source)
        else:
            _write_rows(_rows(table, added), [*table.columns, *added], temporary, suffix)


def _same_lines(source: Path, suffix: str) -> bool:
    """Whether two files separate rows and values alike: csv and tsv don't, nor json and jsonl."""
    from peft_recipes.data.files import LINES, suffixes_of

    given = suffixes_of(source)[0]
    return given == suffix or (given in LINES and suffix in LINES)


def _rows(table: Table, added: dict[str, list[Any]]) -> list[dict[str, Any]]:
    columns = zip(*added.values(), strict=True)
    return [
        {**{name: row.get(name) for name in table.columns}, **dict(zip(added, values, strict=True))}
        for row, values in zip(table.rows, columns, strict=True)
    ]


def _write_rows(rows: list[dict[str, Any]], columns: list[str], path: Path, suffix: str) -> None:
    if _WRITTEN[suffix] == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([cell(row[name]) for name in columns] for row in rows)
        return
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if suffix == ".json" else "".join(f"{line}\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def _write_parquet(table: Table, added: dict[str, list[Any]], path: Path, source: Path | None) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    if source is not None and source.suffix.lower() == ".parquet":
        rows = parquet.read_table(source)
        for name, values in added.items():
            rows = rows.append_column(name, [values])
    else:
        from datasets import Dataset

        rows = Dataset.from_list(_rows(table, added), on_mixed_types="use_json").data.table.combine_chunks()
    assert isinstance(rows, pyarrow.Table)
    parquet.write_table(rows, path)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A file next to `path` that takes its place at the end."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
