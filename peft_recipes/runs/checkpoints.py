"""Checkpoints of a run that is under way: written beside and renamed, so that one with a name is whole; found again."""

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

from peft_recipes.runs.files import write_json

FOLDER = "trainer"  # in the run's folder
STATE_FILE = "run_state.json"  # written last: what our trainers count, and the other files' sizes
_PREFIX, _STAGING = "checkpoint-", ".writing"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(RuntimeError):
    """The disk is full."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder (for Trainer's `resume_from_checkpoint`), its step, what was stored beside."""

    folder: Path
    step: int
    state: dict[str, Any]


def newest(folder: Path, signature: str) -> tuple[Checkpoint | None, list[str]]:
    """The last whole checkpoint of a run of this signature, or None; and a word on each broken one that was skipped."""
    skipped = []
    for place in sorted(folder.glob(f"{_PREFIX}*"), key=_step, reverse=True):
        try:
            state = _whole(place)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            skipped.append(f"{place.name} is broken and was skipped: {error}")
            continue
        if state.get("signature") == signature:
            return Checkpoint(place, _step(place), state), skipped
    return None, skipped


def _step(place: Path) -> int:
    number = place.name.removeprefix(_PREFIX)
    return int(number) if number.isdigit() else -1


def _whole(place: Path) -> dict[str, Any]:
    """Its state. Raises where a file is missing or is not what was written."""
    state = json.loads((place / STATE_FILE).read_text(encoding="utf-8"))
    for name, size in state["files"].items():
        found = (place / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")
        if name.endswith(".json"):
            json.loads((place / name).read_text(encoding="utf-8"))
        if name.endswith(".safetensors"):
            _readable(place / name)
    return state


def _readable(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(f"{path.name} can't be read: {error}") from error


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A fresh folder beside the checkpoints to write the next one into; gone afterwards, whatever happens.

    Raises NoRoom where the disk is full; the checkpoints that were there still are.
    """
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
    except Exception as error:
        if disk_full(error):
            shutil.rmtree(staging, ignore_errors=True)
            raise NoRoom(_no_room(folder, error)) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(made: Path, folder: Path, state: dict[str, Any]) -> Path:
    """Gives a checkpoint that was written whole its name in `folder`."""
    sizes = {p.relative_to(made).as_posix(): p.stat().st_size for p in sorted(made.rglob("*")) if p.is_file()}
    write_json(made / STATE_FILE, {**state, "files": sizes})
    final = folder / made.name
    if final.exists():  # of a run that was resumed at this very step, or of another signature
        shutil.rmtree(final)
    os.replace(made, final)
    return final


def disk_full(error: BaseException) -> bool:
    """Whether an exception says that there is no room on the disk, in the words of any of the libraries that write."""
    link: BaseException | None = error
    while link is not None:
        text = str(link).lower()
        if getattr(link, "errno", None) in _DISK_FULL or any(
            words in text for words in ("no space left", "file too large", "disk quota", "file write failed")
        ):
            return True
        link = link.__cause__ or link.__context__
    return False


def _no_room(folder: Path, error: BaseException) -> str:
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free"
    steps = sorted(_step(p) for p in folder.glob(f"{_PREFIX}*"))
    kept = f"The checkpoint of step {steps[-1]} is whole" if steps else "Nothing was lost but this run's steps"
    return (
        f"No room on the disk for a checkpoint in {folder}{free} ({' '.join(str(error).split())[:120]}). {kept}. "
        "Make room and call again: the run goes on from its last checkpoint."
    )
