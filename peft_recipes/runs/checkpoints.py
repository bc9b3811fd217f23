"""Checkpoints of a run in progress, written atomically, and the search for the newest complete one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.errors import causes
from peft_recipes.runs.files import write_json

FOLDER = "trainer"  # in the run's folder
STATE_FILE = "run_state.json"  # written last: the trainer's counts, and the sizes of the other files
_PREFIX, _STAGING = "checkpoint-", ".writing"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_MESSAGES = ("no space left", "file too large", "disk quota", "file write failed")


class DiskFull(RuntimeError):
    """The disk has no room for a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder (for Trainer's `resume_from_checkpoint`), its step and its run state."""

    folder: Path
    step: int
    state: dict[str, Any]


def newest(folder: Path, signature: str) -> tuple[Checkpoint | None, list[str]]:
    """The last complete checkpoint of this signature, or None; and a message for each broken one that was skipped."""
    skipped = []
    for path in sorted(folder.glob(f"{_PREFIX}*"), key=_step, reverse=True):
        try:
            state = _checked_state(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            skipped.append(f"{path.name} is broken and was skipped: {error}")
            continue
        if state.get("signature") == signature:
            return Checkpoint(path, _step(path), state), skipped
    return None, skipped


def other_note(folder: Path, signature: str) -> str | None:
    """What is lost where the newest checkpoint belongs to another signature; None where there is no such checkpoint."""
    for path in sorted(folder.glob(f"{_PREFIX}*"), key=_step, reverse=True):
        try:
            found = _checked_state(path).get("signature")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if found != signature:
            return (
                f"The unfinished run in its folder had {_step(path):,} steps of another recipe, data or code version: "
                "they were not used, and the training started again."
            )
    return None


def newest_name(folder: Path) -> str | None:
    """Return the name of the checkpoint of the highest step, which may be broken; None without one."""
    names = [path.name for path in sorted(folder.glob(f"{_PREFIX}*"), key=_step)]
    return names[-1] if names else None


def _step(path: Path) -> int:
    number = path.name.removeprefix(_PREFIX)
    return int(number) if number.isdigit() else -1


def _checked_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's run state. Raises ValueError or OSError where a file is missing or cut short."""
    from safetensors import SafetensorError, safe_open

    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    for name, size in state["files"].items():
        path = folder / name
        if (actual := path.stat().st_size) != size:
            raise ValueError(f"{name} has {actual:,} bytes instead of {size:,}")
        if name.endswith(".json"):
            json.loads(path.read_text(encoding="utf-8"))
        if name.endswith(".safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    file.keys()
            except SafetensorError as error:
                raise ValueError(f"{path.name} can't be read: {error}") from error
    return state


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder for the next checkpoint. Raises DiskFull; the earlier checkpoints are kept."""
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
    except Exception as error:
        if disk_full(error):
            shutil.rmtree(staging, ignore_errors=True)  # before the free space is measured for the message
            raise DiskFull(_disk_full_message(folder, error)) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(checkpoint: Path, folder: Path, state: dict[str, Any]) -> Path:
    """Move a checkpoint that is completely written to `folder`, with its run state."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_json(checkpoint / STATE_FILE, {**state, "files": sizes})
    final = folder / checkpoint.name
    if final.exists():  # of a run resumed at this very step, or of another signature
        shutil.rmtree(final)
    os.replace(checkpoint, final)
    return final


def disk_full(error: BaseException) -> bool:
    """Whether an exception, or one that caused it, means a full disk, as any of the writing libraries report it."""
    for cause in causes(error):
        text = str(cause).lower()
        if getattr(cause, "errno", None) in _DISK_FULL or any(words in text for words in _DISK_FULL_MESSAGES):
            return True
    return False


def _disk_full_message(folder: Path, error: BaseException) -> str:
    free = ""
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free"
    steps = sorted(_step(path) for path in folder.glob(f"{_PREFIX}*"))
    kept = f"The checkpoint of step {steps[-1]} is complete" if steps else "Only the steps of this run are lost"
    return (
        f"No room on the disk for a checkpoint in {folder}{free} ({' '.join(str(error).split())[:120]}). {kept}. "
        "Make room and call again: the run goes on from its last checkpoint."
    )
