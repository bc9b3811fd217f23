"""Run folders: where a run lies, what is in it, its run.json; written beside and renamed, so it is whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.hardware import code_version
from peft_recipes.recipe import Recipe

BASE = "base"  # the row of the untrained base, which is no arm
RUN_FILE = "run.json"
# What the arms store that are neither a model nor PEFT's.
OWN_FILES = {"head": "head.safetensors", "bitfit": "biases.safetensors"}


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


def signature(recipe: Recipe, arm: str, seed: int, fingerprint: str) -> str:
    """What makes a run's figures: two runs with one signature need not both be trained."""
    plain = recipe.to_dict()
    for key in ("title", "description", "margin", "embedded", "name", "metric", "checkpoint_seconds"):
        plain.pop(key)
    plain["arms"] = plain["arms"].get(arm)
    said = json.dumps([plain, arm, seed, fingerprint, code_version()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:20]


def with_precision(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe with its precision said: the one that `folder` began with, else what a trial finds on this machine.

    Near the trial's threshold two processes might choose two precisions, and what is resumed would not be what began.
    """
    from peft_recipes.hardware import choose
    from peft_recipes.plain import read_yaml

    chosen = recipe.training.get("bf16")
    if chosen is None and folder is not None and (folder / "recipe.yaml").is_file():
        with contextlib.suppress(RecipeError, AttributeError, OSError):
            chosen = (read_yaml(folder / "recipe.yaml").get("training") or {}).get("bf16")
    if not isinstance(chosen, bool):
        chosen = choose(recipe.training, recipe.threads).precision == "bf16"
    return recipe.with_changes({"training": {"bf16": chosen}})


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


LOCK_FILES = (".lock", ".lock-holder")


@contextlib.contextmanager
def locked(folder: Path, wait: bool | float = False) -> Iterator[None]:
    """Two processes never write one folder; a dead one's lock does not count (the system lets go of it).

    wait: until the other is done (True), or for so many seconds. Raises RecipeError, naming the other, where it is not.
    """
    from filelock import FileLock, Timeout

    path, holder = (folder / name for name in LOCK_FILES)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=-1 if wait is True else wait or 0)
    except Timeout as error:
        who = ""
        with contextlib.suppress(OSError):
            who = holder.read_text(encoding="utf-8").strip()
        raise RecipeError(
            f"{folder} is being written by another process{who and f' ({who})'}. Wait for it (--wait does), or name "
            "another --output."
        ) from error
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock itself holds
            holder.write_text(f"process {os.getpid()}, since {time.strftime('%H:%M:%S')}\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # before it is let go: whoever waits for it looks whether it still has its name
        lock.release()


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
