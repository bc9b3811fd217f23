"""Remove the paths of this machine from recipes, figures and text before they are published.

A local model or dataset becomes `./its-name`: a reader can put a copy there, and it is never looked up on the Hub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft_recipes.models.bases import is_local
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.mixture import NAMES_APART

# Keys whose value may be a path: a recipe's model and dataset, an adapter's base.
_PATH_KEYS = ("model", "dataset", "path", "base_model_name_or_path")
_IMAGE = re.compile(r"[A-Za-z0-9+][A-Za-z0-9+/]{99,}={0,2}")  # base64, as a comparison holds its sample images
_ABSOLUTE = re.compile(r"(?<![\w:/.<])(?:~|/[\w.@+%-]+)(?:/[\w.@+%-]+)+/?|\b[A-Za-z]:\\[^\s'\"]+")


def portable(data: Any, key: str = "") -> Any:
    """Return JSON data (of a run, a recipe, a comparison) without paths of this machine. key: the key of `data`."""
    if isinstance(data, dict):
        return {name: portable(value, name) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [portable(value) for value in data]
    if not isinstance(data, str):
        return data
    return short(data) if key in _PATH_KEYS and is_local_path(data) else without_paths(data)


def is_local_path(name: str) -> bool:
    """Return whether a model or dataset is a file or folder of this machine, not a Hub id or a stand-in.

    Of the datasets of a mixture ("a.csv + b.jsonl") one is enough.
    """
    if NAMES_APART in name and not is_local(name):
        return any(map(is_local_path, name.split(NAMES_APART)))
    return not name.startswith(EMBEDDED) and is_local(name)


def short(name: str) -> str:
    """Return `./name` of a file or folder, and of those of a mixture."""
    if NAMES_APART in name and not Path(name).exists():
        return NAMES_APART.join(short(part) if is_local_path(part) else part for part in name.split(NAMES_APART))
    path = Path(name.rstrip("/") or "/").expanduser()
    return f"./{path.name if path.name not in ('', '.', '..') else path.resolve().name}"


def without_paths(text: str) -> str:
    """Return text with each absolute path shortened to its last part; an image in base64 as it is."""
    if _IMAGE.fullmatch(text):
        return text
    for folder in (Path.cwd(), Path.home()):
        if len(folder.parts) > 2:
            text = text.replace(f"{folder}/", "./").replace(str(folder), ".")
    return _ABSOLUTE.sub(lambda match: short(match[0].replace("\\", "/")), text)
