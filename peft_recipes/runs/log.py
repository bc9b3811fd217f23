"""What a run writes while it works and when it has: log.jsonl, a line an event, and predictions.parquet."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from peft_recipes.runs.files import write_json, write_text


def opened_log(path: Path, step: int) -> TextIO:
    """log.jsonl, with what was logged up to the step that the run goes on from."""
    if step and path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _logged_step(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in lines))
    return path.open("a" if step else "w", encoding="utf-8", buffering=1)


def no_log() -> TextIO:
    """What a process that is not the main one writes its events to."""
    return open(os.devnull, "w")


def _logged_step(line: str) -> float:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return json.loads(line).get("step", math.inf)
    return math.inf  # half a line, of a process that was killed while it wrote


def log_step(lines: TextIO, step: int, of: int, loss: float | None) -> None:
    """An optimiser step: its number, of how many, and the last loss that was logged."""
    log(lines, step=step, of=of, loss=loss)


def log(lines: TextIO, **line: Any) -> None:
    """One event, with its time."""
    lines.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")


def write_bad_batch(folder: Path, trainer: Any, ids: list[str]) -> Path:
    """bad_batch.json: the examples of the step that a run stopped at, by id and as the model was given them."""
    step = max(trainer.state.global_step, 1)
    rows = trainer.train_dataset
    examples = [
        {"id": ids[place], **{k: v for k, v in rows[place].items() if isinstance(v, (list, int, float, str))}}
        for place in trainer.examples_of_step(step)
    ]
    write_json(folder / "bad_batch.json", {"step": step, "examples": examples})
    return folder / "bad_batch.json"
