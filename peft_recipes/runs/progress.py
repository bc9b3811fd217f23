"""A run that is paused between two chunks of its training: progress.json and progress.parquet in its folder.

Both are written at every pause, after the checkpoint of its step, and deleted once the run is finished.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_recipes.runs.files import write_json

PAUSED = "paused"  # the state of such a run
PROGRESS_FILE = "progress.json"
SCORES_FILE = "progress.parquet"
PROGRESS_FILES = (PROGRESS_FILE, SCORES_FILE)


def read_progress(folder: Path, signature: str | None = None) -> dict[str, Any] | None:
    """Read a folder's progress.json; None where there is none, a broken one, or that of another signature."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        if progress.get("schema") == 1 and signature in (None, progress.get("signature")):
            return progress
    return None


def write_progress(folder: Path, progress: dict[str, Any], ids: Sequence[str], scores: Sequence[float]) -> None:
    """Write progress.json, and add the validation scores of its step to progress.parquet.

    The columns of the table are id, step and score; a higher score is better.
    """
    import pandas

    path, step = folder / SCORES_FILE, progress["step"]
    new = pandas.DataFrame({"id": list(ids), "step": step, "score": [float(score) for score in scores]})
    kept = {point["step"] for point in progress["validation"]} - {step}
    old = _read_scores(path)
    tables = [new] if old is None else [old[old["step"].isin(kept)], new]
    temporary = folder / f".{SCORES_FILE}"
    pandas.concat([table for table in tables if len(table)] or [new], ignore_index=True).to_parquet(
        temporary, index=False
    )
    temporary.replace(path)
    write_json(folder / PROGRESS_FILE, progress)


def clear_progress(folder: Path) -> None:
    """Delete the progress of a run that is finished."""
    for name in PROGRESS_FILES:
        (folder / name).unlink(missing_ok=True)


def _read_scores(path: Path) -> Any:
    import pandas

    if not path.is_file():
        return None
    try:
        return pandas.read_parquet(path)
    except (OSError, ValueError):
        return None
