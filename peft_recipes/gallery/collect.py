"""Find the comparisons, the runs outside of comparisons and the other adapters below a folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.cards.redaction import without_paths
from peft_recipes.errors import RecipeError
from peft_recipes.runs.folder import BASE, RUN_FILE, Run, read_comparison_file, read_run

COMPARISON_FILE, ADAPTER_FILE, LOG = "comparison.json", "adapter_config.json", "log.jsonl"
CARD = "README.md"


@dataclass
class Found:
    """What a folder holds. `left_out`: what can't be shown, as (path below the folder, reason)."""

    root: Path
    comparisons: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    adapters: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def name(self, folder: Path) -> str:
        """A path below the root, as it is shown: without the root, which is a path of this machine."""
        return folder.relative_to(self.root).as_posix()


def collect(root: Path, without: Path | None = None) -> Found:
    """Read what is below `root`, in the order of the paths. without: a folder that is not entered (the output).

    Raises RecipeError where `root` is no folder. A broken file is left out, with its reason.
    """
    if not root.is_dir():
        raise RecipeError(f"{root} is {'not a folder' if root.exists() else 'not there'}. Name a folder with runs.")
    root = Path(os.path.abspath(root))  # of "." too the parents are known
    found, covered = Found(root), set()
    for folder, names in _folders(root, without, found):
        if COMPARISON_FILE in names and (data := _comparison(folder, found)) is not None:
            covered |= run_folders(folder, data)
        if RUN_FILE in names:
            if folder not in covered and (run := _run(folder, found)) is not None:
                found.runs.append(run)
        elif LOG in names:
            found.left_out.append((found.name(folder), "an unfinished run (no run.json)"))
        elif ADAPTER_FILE in names:
            _adapter(folder, found)
    return found


def run_folders(folder: Path, data: dict[str, Any]) -> set[Path]:
    """The folders of the runs whose figures a comparison holds; the base has one run."""
    arms = {name: arm for name, arm in data["arms"].items() if isinstance(arm, dict)}
    folders = {folder / name / f"seed-{seed}" for name, arm in arms.items() for seed in _seeds(arm, data)}
    return folders | {folder / BASE / f"seed-{seed}" for seed in _seeds({}, data)[:1]}


def _seeds(arm: dict[str, Any], data: dict[str, Any]) -> list[Any]:
    """The seeds of an arm, failed ones included; none where the file has something else there."""
    seeds, failures = arm.get("seeds") or data.get("seeds"), arm.get("failures")
    failed = [one.get("seed") for one in failures if isinstance(one, dict)] if isinstance(failures, list) else []
    return [*(seeds if isinstance(seeds, list) else []), *failed]


def _folders(root: Path, without: Path | None, found: Found) -> list[tuple[Path, set[str]]]:
    """Every folder with the names of its files, parents first; without hidden folders and checkpoints.

    Links are followed, each folder once.
    """
    skipped, seen, folders = without.resolve() if without else None, set(), []

    def unreadable(error: OSError) -> None:
        found.left_out.append((found.name(Path(error.filename)), f"can't be read ({error.strerror})"))

    for path, inner, files in os.walk(root, onerror=unreadable, followlinks=True):
        folder = Path(path)
        real = folder.resolve()
        if real in seen or real == skipped:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith((".", "checkpoint-")))
        folders.append((folder, set(files)))
    return folders


def _comparison(folder: Path, found: Found) -> dict[str, Any] | None:
    try:
        data = read_comparison_file(folder)
    except (RecipeError, RecursionError, OSError) as error:
        _leave_out(found, folder, COMPARISON_FILE, error)
        return None
    if data.get("provisional"):
        reason = "provisional: its runs are not all finished, and the same `compare` finishes them"
        found.left_out.append((found.name(folder / COMPARISON_FILE), reason))
    else:
        found.comparisons.append((folder, data))
    return data


def _run(folder: Path, found: Found) -> Run | None:
    try:
        return read_run(folder)
    except (RecipeError, RecursionError) as error:
        _leave_out(found, folder, RUN_FILE, error)
        return None


def _adapter(folder: Path, found: Found) -> None:
    try:
        data = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not data.get("peft_type"):
            raise ValueError("it has no 'peft_type'")
        found.adapters.append((folder, data))
    except (ValueError, OSError, RecursionError) as error:
        _leave_out(found, folder, ADAPTER_FILE, error)


def _leave_out(found: Found, folder: Path, file: str, error: Exception) -> None:
    """Note a broken file. The path in an error's message is one of this machine, the reason behind it is not."""
    reason = " ".join(str(error).split()).removeprefix(f"{folder / file} ")
    found.left_out.append((found.name(folder / file), without_paths(reason)))
