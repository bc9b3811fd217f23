"""Files of rows: their formats and compression, opened as text, and checked line by line before they are read."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from peft_recipes.errors import RecipeError

# The suffix of a file, in any case, and the reader of `datasets` for it.
FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
LINES = (".jsonl", ".ndjson")  # one JSON object a line
_ZSTD = ".zst"
_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = (*_COMPRESSIONS, _ZSTD)
KINDS = f"{', '.join(FORMATS)} (also compressed: {', '.join(COMPRESSED)})"
_NOT_READ = {
    ".xlsx": "save the sheet as csv (UTF-8)",
    ".xls": "save the sheet as csv (UTF-8)",
    ".ods": "save the sheet as csv (UTF-8)",
    ".zip": "unpack it, and name the file or folder inside",
    ".tar": "unpack it, and name the folder",
    ".tgz": "unpack it, and name the folder",
    ".7z": "unpack it, and name the file or folder inside",
    ".pkl": "a pickle can run code; save the rows as parquet or jsonl",
    ".pickle": "a pickle can run code; save the rows as parquet or jsonl",
    ".pt": "a pickle can run code; save the rows as parquet or jsonl",
}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def suffixes_of(path: Path) -> tuple[str, str]:
    """The suffix of a file's format and of its compression, in lower case; "" for a suffix that is not read."""
    suffix, compression = path.suffix.lower(), ""
    if suffix in COMPRESSED:
        compression, suffix = suffix, Path(path.stem).suffix.lower()
    if suffix not in FORMATS or (compression and FORMATS[suffix] == "parquet"):
        suffix = ""
    return suffix, compression


def format_of(path: Path) -> str | None:
    """The reader of `datasets` for a file ("csv", "json", "parquet", "text"), by its suffix; None: not read."""
    return FORMATS.get(suffixes_of(path)[0])


def why_not_read(path: Path) -> str:
    """What to do with a file whose suffix is not read, ending with a full stop."""
    hint = _NOT_READ.get(path.suffix.lower())
    return f"{path.suffix} files are not read: {hint}." if hint else f"Files that are read: {KINDS}."


def open_binary(path: Path) -> IO[bytes]:
    """Open a file, decompressed by its suffix. Raises RecipeError where zstandard is not installed."""
    compression = suffixes_of(path)[1]
    if compression == _ZSTD:
        try:
            import zstandard
        except ImportError as error:
            raise RecipeError(
                f"{path}: .zst files need the package zstandard. pip install zstandard, or unpack it: zstd -d {path}."
            ) from error
        return io.BufferedReader(zstandard.open(path, "rb"))
    return _COMPRESSIONS[compression](path, "rb") if compression else path.open("rb")


@contextlib.contextmanager
def opened_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file of UTF-8 text, without a byte order mark, its line ends as they are.

    Raises RecipeError, also for what is read inside the block: no such file, a broken compressed file, other encodings.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = _without_utf_16(stack.enter_context(open_binary(path)), path)
            yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}). Save it as UTF-8; from Windows' own "
            f"encoding: iconv -f CP1252 -t UTF-8 {path.name} > utf8-{path.name}."
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise RecipeError(f"{path} can't be decompressed ({error}). Copy or download it again.") from error
    except OSError as error:
        raise RecipeError(f"{path} can't be read: {error.strerror or error}.") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise RecipeError(f"{path} can't be decompressed ({error}). Copy or download it again.") from error


def _without_utf_16(file: IO[bytes], path: Path) -> Any:
    buffered = file if hasattr(file, "peek") else io.BufferedReader(file)  # type: ignore[type-var]
    if buffered.peek(2)[:2] in _UTF_16:
        raise RecipeError(
            f"{path} is UTF-16 text. Save it as UTF-8, for example: iconv -f UTF-16 -t UTF-8 {path.name} > "
            f"utf8-{path.name}."
        )
    return buffered


def check_file(path: Path, what: str = "dataset file") -> tuple[str, ...]:
    """How a file is read: the reader of `datasets`, and of csv its delimiter and columns.

    Raises RecipeError for a file that is missing, empty or broken, with the line of what is broken.
    """
    if not path.is_file():
        raise RecipeError(f"{what} {path} is not there.")
    if path.stat().st_size == 0:
        raise RecipeError(f"{what} {path} is empty.")
    suffix, _ = suffixes_of(path)
    if suffix in LINES:
        _check_json_lines(path)
    elif suffix == ".json":
        _check_json(path)
    return ("csv", *check_csv(path)) if FORMATS[suffix] == "csv" else (FORMATS[suffix],)


def _once(path: Path, where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def pairs(given: list[tuple[str, Any]]) -> dict[str, Any]:
        read = dict(given)
        if len(read) < len(given):
            keys = [key for key, _ in given]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RecipeError(f"{path}{where}: an object has the key '{twice}' twice. Keep one of them.")
        return read

    return pairs


def parse_json(text: str, path: Path, number: int | None = None) -> Any:
    """Parse JSON. Raises RecipeError with the line (`number`, else by the parser): invalid, a key that is given twice.

    The constants NaN and Infinity, which Python's json would accept, are no JSON.
    """
    where = f", line {number}" if number else ""

    def refused(name: str) -> Any:
        raise RecipeError(f"{path}{where}: {name} is no JSON. Write null, or a number.")

    try:
        return json.loads(text, object_pairs_hook=_once(path, where), parse_constant=refused)
    except json.JSONDecodeError as error:
        line = number or error.lineno
        raise RecipeError(f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno}).") from error
    except RecursionError as error:
        raise RecipeError(f"{path}{where}: nested too deeply to be read.") from error


def _check_json_lines(path: Path) -> None:
    rows = 0
    if _is_list(path):  # a list in a file of another name, which `datasets` reads all the same
        _check_json(path)
        return
    with opened_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows += 1
                if not isinstance(parse_json(line, path, number), dict):
                    raise RecipeError(f"{path}, line {number}: expected a JSON object.")
    if not rows:
        raise RecipeError(f"{path} is empty: it has no rows.")


def _is_list(path: Path) -> bool:
    """Whether a file of JSON lines is one list, on one line or on several."""
    with opened_text(path) as lines:
        first = next((line for line in lines if line.strip()), "")
    return first.lstrip().startswith("[")


def _check_json(path: Path) -> None:
    """A list of objects, one object of columns, or an object a line, as `datasets` reads them."""
    with opened_text(path) as file:
        text = file.read()
    if not text.strip():
        raise RecipeError(f"{path} is empty: it has no rows.")
    if text.lstrip().startswith("{") and "\n" in text.strip():
        first = text.lstrip().splitlines()[0]
        if _is_json(first):
            _check_json_lines(path)
            return
    rows = parse_json(text, path)
    if isinstance(rows, dict):
        if not rows or any(isinstance(value, (list, dict)) for value in rows.values()):
            raise RecipeError(
                f"{path} holds one object ({', '.join(list(rows)[:5])}); expected a list of objects, one a row. Save "
                "its rows as such a list, or as jsonl."
            )
        return
    if not isinstance(rows, list):
        raise RecipeError(f"{path}: expected a list of objects, got {type(rows).__name__}.")
    if not rows:
        raise RecipeError(f"{path} is empty: it has no rows.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RecipeError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}.")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def delimiter_of(path: Path, header: str) -> str:
    """The delimiter of a csv or tsv file by its first line: a comma, or the semicolon or tab that some programs write.

    A semicolon or tab counts where the line has no comma outside quotes.
    """
    if suffixes_of(path)[0] == ".tsv":
        return "\t"
    fields = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in ",;\t"}
    return next((mark for mark in ",;\t" if fields[mark] > 1), ",")


def csv_reader(path: Path, lines: Iterator[str], **options: Any) -> tuple[Any, list[str], str]:
    """A csv reader behind the header of a file, its columns, and its delimiter.

    A column without a name is "Unnamed: NUMBER", as pandas has it. Raises RecipeError for a column named twice.
    """
    csv.field_size_limit(2**31 - 1)
    first = next((line for line in lines if line.strip("\r\n")), "")
    delimiter = delimiter_of(path, first)

    def with_first() -> Iterator[str]:
        yield first
        yield from lines

    rows = csv.reader(with_first(), delimiter=delimiter, strict=True, **options)
    names = [name or f"Unnamed: {number}" for number, name in enumerate(next(rows, []))]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise RecipeError(
                f"{path}: the column '{name}' is named twice in its header (columns {names.index(name) + 1} and "
                f"{number + 1}). Rename or remove one."
            )
    return rows, names, delimiter


def check_csv(path: Path) -> tuple[str, ...]:
    """The delimiter of a csv file, and its columns. Raises RecipeError with the line of what is broken."""
    with opened_text(path) as file:
        start = 1
        rows = None
        try:
            rows, header, delimiter = csv_reader(path, iter(file))
            first = start = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(header):
                    raise RecipeError(
                        f"{path}, line {start}: {len(row)} values where the header has {len(header)} "
                        f"({', '.join(header)}). A value with a {_NAMES[delimiter]} or a line break in it needs quotes."
                    )
                start = rows.line_num + 1
            if start == first:
                raise RecipeError(f"{path} is empty: it has a header and no rows.")
            return (delimiter, *header)
        except csv.Error as error:
            opened = f"line {start}: a quote that is opened here is never closed" if "end of data" in str(error) else ""
            line = rows.line_num if rows else 1
            raise RecipeError(f"{path}, {opened or f'line {line}: {error}'}.") from error


_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}
