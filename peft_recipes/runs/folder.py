"""Run folders: where a run lies, what is in it, its run.json; written beside and renamed, so it is whole or absent."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError, within
from peft_recipes.hardware.environment import code_version
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import read_yaml
from peft_recipes.runs.files import check_output

BASE = "base"  # the row of the untrained base, which is no arm
RUN_FILE = "run.json"


@dataclass
class Run:
    """One finished run: its folder, and its run.json as `data`."""

    folder: Path
    data: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.data.get("status") == "ok"

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """split -> metric -> value."""
        return self.data.get("metrics", {})

    def __repr__(self) -> str:
        scores = ", ".join(f"{k} {v:.4g}" for k, v in self.metrics.get("test", {}).items())
        return f"Run({self.folder}, {self.data.get('status')}{': ' + scores if scores else ''})"


def run_folder(output: Path, recipe: Recipe, arm: str, seed: int) -> Path:
    """`<output>/<recipe>/<arm>/seed-<n>`."""
    return output / recipe.name / arm / f"seed-{seed}"


def read_run(folder: Path) -> Run | None:
    """The run of a folder, or None where none was finished there. Raises RecipeError for a run.json that is broken."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or "status" not in data:
            raise ValueError("it has no 'status'")
        return Run(folder, data)
    except (ValueError, OSError) as error:
        raise RecipeError(f"{path} can't be read: {error}. Delete it to do the run again.") from error


def signature(recipe: Recipe, arm: str, seed: int, fingerprint: str) -> str:
    """What makes a run's figures: two runs with one signature need not both be trained."""
    plain = recipe.to_dict()
    for key in ("title", "description", "margin", "embedded", "name", "metric", "checkpoint_seconds"):
        plain.pop(key)
    plain["arms"] = plain["arms"].get(arm)
    said = json.dumps([plain, arm, seed, fingerprint, code_version()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:20]


def read_comparison_file(folder: str | Path) -> dict[str, Any]:
    """The comparison.json of a folder. Raises RecipeError where there is none or it can't be read."""
    path = Path(folder) / "comparison.json"
    if not path.is_file():
        below = sorted(p.parent for p in Path(folder).glob("*/comparison.json"))
        hint = f" There are some in: {', '.join(map(str, below))}." if below else " `peft-recipes compare` makes one."
        raise RecipeError(f"{folder} holds no comparison.json.{hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != 1 or not isinstance(data["arms"], dict):
            raise ValueError(f"schema {data['schema']} is not known to this version")
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} can't be read: {error}.") from error
    return data


def resolved_recipe(path: Path) -> Recipe:
    """The recipe.yaml of a run, which alone reproduces it."""
    if not path.is_file():
        raise RecipeError(f"{path} is not there: the folder is not a run of peft-recipes.")
    with within(str(path)):
        return Recipe.from_dict(read_yaml(path))


def check_free(output: Path, folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises RecipeError where a run can't be written to its folder, or would replace one unasked."""
    check_output(output)
    if folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        what = "a finished run" if (folder / RUN_FILE).is_file() else "an unfinished run"
        raise RecipeError(f"{folder} holds {what}. Go on from it with --resume, or replace it with --overwrite.")


def finished(folder: Path, signature: str) -> Run | None:
    """The finished run of a folder. Raises RecipeError where it is one of another recipe, data or code."""
    done = read_run(folder)
    if done is None or not done.ok:
        return None
    if done.data.get("signature") == signature:
        return done
    raise RecipeError(f"{folder} holds a finished run of another recipe, data or code. Replace it with "
                      "--overwrite, or name another --output.")  # fmt: skip
