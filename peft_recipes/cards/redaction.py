"""What may leave this machine: recipes, figures and text with the places of this machine taken out of them.

A local model or dataset becomes `./its-name`: whoever has it puts it there, and nobody asks the Hub for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft_recipes.models.bases import is_local
from peft_recipes.recipe.dataset import EMBEDDED

# Keys whose value names a place: a recipe's model and dataset, an adapter's base.
_PLACES = ("model", "dataset", "path", "base_model_name_or_path")
_ABSOLUTE = re.compile(r"(?<![\w:/.<])(?:~|/[\w.@+%-]+)(?:/[\w.@+%-]+)+/?|\b[A-Za-z]:\\[^\s'\"]+")


def portable(data: Any) -> Any:
    """Plain data (of a run.json, a recipe, a comparison) without paths of this machine."""
    if isinstance(data, dict):
        return {key: _named(value) if key in _PLACES else portable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [portable(value) for value in data]
    return without_paths(data) if isinstance(data, str) else data


def _named(value: Any) -> Any:
    return short(value) if isinstance(value, str) and is_place(value) else portable(value)


def is_place(name: str) -> bool:
    """Whether a recipe's model or dataset is a file or folder of this machine, and no Hub id or stand-in."""
    return not name.startswith(EMBEDDED) and is_local(name)


def short(place: str) -> str:
    """`./name` of a file or folder."""
    path = Path(place.rstrip("/") or "/").expanduser()
    return f"./{path.name if path.name not in ('', '.', '..') else path.resolve().name}"


def without_paths(text: str) -> str:
    """Text with each absolute path shortened to its last part."""
    for place in (str(Path.cwd()), str(Path.home())):
        if len(Path(place).parts) > 2:
            text = text.replace(f"{place}/", "./").replace(place, ".")
    return _ABSOLUTE.sub(lambda found: short(found[0].replace("\\", "/")), text)
