"""Atomic writes of text and JSON, and the folders they go to."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError


def write_json(path: Path, data: Any) -> None:
    """JSON beside and renamed: a reader sees the old file or the new one, whole."""
    write_text(path, json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def finite(data: Any) -> Any:
    """Data as JSON takes it: a figure that is no number (a perplexity beyond all bounds) is null."""
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_text(path: Path, text: str) -> None:
    """Text beside and renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(output: Path, what: str = "--output ") -> None:
    """Raises RecipeError where nothing can be written below `output`; writes nothing itself. what: it is called."""
    place = output.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise RecipeError(f"{what}{output}: {place} is a file, so no folder can be made there.")
    if not os.access(place, os.W_OK | os.X_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        raise RecipeError(f"{what}{output}: {place} can't be written. Name another folder, or make it writable.")


def make_folder(folder: Path) -> None:
    """The folder and those above it. Raises RecipeError where it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{folder} can't be made: {error.strerror}. Name another folder with --output.") from error


def clear(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Removes what an earlier run left in its folder."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def file_sizes(folder: Path, names: list[str] | None = None) -> dict[str, int]:
    """Bytes on disk of the files directly in a folder (of those named, where names are given)."""
    return {
        p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and (not names or p.name in names)
    }
