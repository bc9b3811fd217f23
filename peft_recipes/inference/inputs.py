"""Read the inputs of a saved adapter (texts from a file, images from files and folders) and write results to a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.data.sources import READERS, read_file
from peft_recipes.errors import RecipeError, nearest
from peft_recipes.runs.files import check_output

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

_WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("to_csv", {"index": False}),
    ".tsv": ("to_csv", {"index": False, "sep": "\t"}),
    ".jsonl": ("to_json", {"force_ascii": False, "lines": True}),
    ".json": ("to_json", {"force_ascii": False, "lines": False}),
    ".parquet": ("to_parquet", {}),
}
# Usual names of a column of texts; the recipe's own name for it is tried first.
_TEXT_COLUMNS = ("text", "prompt", "instruction", "question", "sentence", "content", "review", "message", "body")


def read_texts(path: str | Path, column: str | None = None, usual: Sequence[str] = ()) -> tuple[datasets.Dataset, str]:
    """Read the rows of a file (of a .txt file its non-empty lines); return them with the name of the column of texts.

    column: its name. None: the first of the usual names (`usual` before the others), or the only column of strings.
    Raises RecipeError: no such file, format or column; a value that is not a string, with its row.
    """
    import datasets

    path = Path(path).expanduser()
    if path.suffix == ".txt":
        rows = datasets.Dataset.from_dict({"text": _lines(path)})
    elif path.suffix in READERS:
        rows = next(iter(read_file(path).values()))
    else:
        raise RecipeError(f"--file {path}: expected {', '.join(['.txt', *READERS])}.")
    column = _text_column(rows, column, usual, path)
    for number, value in enumerate(rows[column], 1):
        if not isinstance(value, str):
            raise RecipeError(f"{path}, row {number}, column '{column}': expected text, got {value!r}.")
    return rows, column


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise RecipeError(f"--file {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}).") from error
    if not lines:
        raise RecipeError(f"{path} is empty.")
    return lines


def _text_column(rows: datasets.Dataset, column: str | None, usual: Sequence[str], path: Path) -> str:
    columns = rows.column_names
    if column is not None and column not in columns:
        raise RecipeError(f"{path} has no column '{column}'.{nearest(column, columns)} It has: {', '.join(columns)}.")
    texts = [name for name in columns if str(getattr(rows.features[name], "dtype", "")) in ("string", "large_string")]
    only = texts[0] if len(texts) == 1 else None
    column = column or next((name for name in (*usual, *_TEXT_COLUMNS) if name in texts), only)
    if column is None:
        raise RecipeError(f"{path}: which column has the texts? Name it: --column NAME. It has: {', '.join(columns)}.")
    return column


def check_writable(path: Path) -> None:
    """Raise RecipeError, before any work, if `write_rows` could not write there."""
    if path.suffix not in _WRITERS:
        raise RecipeError(f"--output {path}: expected {', '.join(_WRITERS)}.")
    if path.is_dir():
        raise RecipeError(f"--output {path} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"--output {path}: there is no folder {path.parent}.")
    check_output(path.absolute().parent)


def write_rows(rows: datasets.Dataset, path: Path) -> None:
    """Write rows in the format of the file's suffix (csv, tsv, json, jsonl, parquet), atomically."""
    method, options = _WRITERS[path.suffix]
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        getattr(rows, method)(str(temporary), **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """List the images among files and folders (a folder's by name). Raises RecipeError for a path without any."""
    from PIL import Image

    suffixes, files = set(Image.registered_extensions()), []
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            if not inside:
                raise RecipeError(f"{path} holds no images.")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise RecipeError(f"There is no image {path}.")
    return files


def read_image(path: Path) -> Image:
    """Read and decode an image. Raises RecipeError if the file is not an image."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
        return image
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{path} can't be read as an image: {' '.join(str(error).split())}") from error
