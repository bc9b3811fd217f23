"""Read the inputs of a saved adapter: texts from a file, images from files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.data.files import format_of, why_not_read
from peft_recipes.errors import RecipeError, nearest
from peft_recipes.inference.tables import Table, read_table
from peft_recipes.recipe.addresses import address_problem

if TYPE_CHECKING:
    from PIL.Image import Image

# Usual names of a column of texts; the recipe's own name for it is tried first.
_TEXT_COLUMNS = ("text", "prompt", "instruction", "question", "sentence", "content", "review", "message", "body")


def read_texts(path: str | Path, column: str | None = None, usual: Sequence[str] = ()) -> tuple[Table, str]:
    """Read the rows of a file (of a .txt file its non-empty lines); return them with the name of the column of texts.

    column: its name. None: the first of the usual names (`usual` before the others), or the only column of text.
    Raises RecipeError: no such file, format or column; a value that is not text, with its row; no text at all.
    """
    if problem := address_problem(str(path), "--file"):
        raise RecipeError(problem)
    path = Path(path).expanduser()
    if format_of(path) is None:
        raise RecipeError(f"--file {path}: {why_not_read(path)}")
    table = read_table(path)
    column = _text_column(table, column, usual, path)
    values = table.values(column)
    for number, value in enumerate(values, 1):
        if value is not None and not isinstance(value, str):
            raise RecipeError(f"{path}, row {number}, column '{column}': expected text, got {value!r}.")
    if not any((value or "").strip() for value in values):
        raise RecipeError(f"{path}: no row has a text in its column '{column}'.")
    return table, column


def _text_column(table: Table, column: str | None, usual: Sequence[str], path: Path) -> str:
    columns = table.columns
    if column is not None and column not in columns:
        raise RecipeError(f"{path} has no column '{column}'.{nearest(column, columns)} It has: {', '.join(columns)}.")
    texts = table.text_columns()
    only = texts[0] if len(texts) == 1 else None
    column = column or next((name for name in (*usual, *_TEXT_COLUMNS) if name in texts), only)
    if column is None:
        raise RecipeError(f"{path}: which column has the texts? Name it: --column NAME. It has: {', '.join(columns)}.")
    return column


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
