"""`Scan`: the result of a scan, and the files that hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError

FOLDER, FILE, WINNERS = "scan", "scan.json", "recipe.yaml"


class Scan:
    """A scan, finished or stopped by its budget: `data` is scan.json, `folder` holds it."""

    def __init__(self, data: dict[str, Any], folder: Path):
        self.data, self.folder = data, folder

    @property
    def best(self) -> dict[str, float]:
        """The best learning rate of each arm that has one."""
        return {name: arm["best"] for name, arm in self.data["arms"].items() if arm["best"] is not None}

    @property
    def recipe(self) -> Path:
        """The recipe file with the best learning rates, ready for `compare`."""
        return self.folder / WINNERS

    def __repr__(self) -> str:
        return f"Scan({self.data['recipe']}: {', '.join(f'{k} {v:g}' for k, v in self.best.items())})"


def read_scan(path: Path) -> dict[str, Any] | None:
    """Read the scan.json of an earlier call. Raises RecipeError if it can't be read."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != 1:
            raise ValueError(f"schema {data['schema']} is not known to this version")
        return data
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RecipeError(f"{path} can't be read: {error}. Replace it with --overwrite.") from error
