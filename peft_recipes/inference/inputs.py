"""What a user asks a saved adapter: texts from a file and results back into one, images from files and folders."""

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

_WRITERS = {".csv": "to_csv", ".tsv": "to_csv", ".jsonl": "to_json", ".json": "to_json", ".parquet": "to_parquet"}
# What a column of texts is often called; the recipe's own name for it comes first.
_USUAL = ("text", "prompt", "instruction", "question", "sentence", "content", "review", "message", "body")


def read_texts(path: str | Path, column: str | None = None, usual: Sequence[str] = ()) -> tuple[datasets.Dataset, str]:
    """The rows of a file and the name of the column that holds the texts; of a txt file its lines that are not empty.

    column: its name; found by the usual names where it is None (`usual` first), or as the only column of text.
    Raises RecipeError: no such file, kind or column, a value that is no text, with its row.
    """
    import datasets

    path = Path(path).expanduser()
    if path.suffix == ".txt":
        rows = datasets.Dataset.from_dict({"text": _lines(path)})
    elif path.suffix in READERS:
        rows = next(iter(read_file(path).values()))
    else:
        raise RecipeError(f"--file {path}: expected {', '.join(['.txt', *READERS])}.")
    found = _column(rows, column, usual, path)
    for number, value in enumerate(rows[found], 1):
        if not isinstance(value, str):
            raise RecipeError(f"{path}, row {number}, column '{found}': expected text, got {value!r}.")
    return rows, found


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


def _column(rows: datasets.Dataset, column: str | None, usual: Sequence[str], path: Path) -> str:
    there = rows.column_names
    if column is not None and column not in there:
        raise RecipeError(f"{path} has no column '{column}'.{nearest(column, there)} It has: {', '.join(there)}.")
    texts = [name for name in there if str(getattr(rows.features[name], "dtype", "")) in ("string", "large_string")]
    found = column or next((name for name in (*usual, *_USUAL) if name in texts), None)
    if found is None and len(texts) == 1:
        found = texts[0]
    if found is None:
        raise RecipeError(f"{path}: which column holds the texts? Name it: --column NAME. It has: {', '.join(there)}.")
    return found


def check_writable(path: Path) -> None:
    """Raises RecipeError, before any work, where `write_rows` could not write there."""
    if path.suffix not in _WRITERS:
        raise RecipeError(f"--output {path}: expected {', '.join(_WRITERS)}.")
    if path.is_dir():
        raise RecipeError(f"--output {path} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"--output {path}: there is no folder {path.parent}.")
    check_output(path.absolute().parent)


def write_rows(rows: datasets.Dataset, path: Path) -> None:
    """The rows as csv, tsv, jsonl or parquet, by the file's suffix; beside and renamed."""
    options: dict[str, Any] = {".csv": {"index": False}, ".tsv": {"index": False, "sep": "\t"}}.get(path.suffix, {})
    if path.suffix in (".jsonl", ".json"):
        options = {"force_ascii": False, "lines": path.suffix == ".jsonl"}
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        getattr(rows, _WRITERS[path.suffix])(str(beside), **options)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def image_files(places: Sequence[str | Path]) -> list[Path]:
    """The images among files and folders (a folder's in the order of their names). Raises RecipeError: none there."""
    from PIL import Image

    kinds, found = set(Image.registered_extensions()), []
    for given in places:
        place = Path(given).expanduser()
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in kinds and path.is_file())
            if not inside:
                raise RecipeError(f"{place} holds no images.")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise RecipeError(f"There is no image {place}.")
    return found


def read_image(path: Path) -> Image:
    """An image, decoded. Raises RecipeError where the file is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
        return image
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{path} can't be read as an image: {' '.join(str(error).split())}") from error
