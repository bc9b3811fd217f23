"""Atomic writes of text and JSON, and the folders for them."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically: a reader sees the complete old file or the complete new one."""
    write_text(path, json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def finite(data: Any) -> Any:
    """The data with null for NaN and infinity, which JSON lacks (the perplexity of a diverged run)."""
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_text(path: Path, text: str) -> None:
    """Write text atomically, through a temporary file in the same folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(output: Path, what: str = "--output ") -> None:
    """Raise RecipeError where nothing can be written below `output`; writes nothing. what: its name in the message."""
    parent = output.absolute()
    while not parent.exists() and not parent.is_symlink():
        parent = parent.parent
    if not parent.is_dir():
        raise RecipeError(f"{what}{output}: {parent} is a file, so no folder can be made there.")
    if not os.access(parent, os.W_OK | os.X_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise RecipeError(f"{what}{output}: {parent} can't be written. Name another folder, or make it writable.")


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises RecipeError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{folder} can't be made: {error.strerror}. Name another folder with --output.") from error


def clear(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Delete what an earlier run left in its folder, except the names in `keep`."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def file_sizes(folder: Path, names: list[str] | None = None) -> dict[str, int]:
    """Bytes of the files directly in a folder, or of those in `names`."""
    return {
        p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and (not names or p.name in names)
    }
