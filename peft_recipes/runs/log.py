"""The files a run writes while it trains: log.jsonl, one event a line, and bad_batch.json."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from peft_recipes.runs.files import write_json, write_text


def open_log(path: Path, step: int) -> TextIO:
    """Open log.jsonl with the events up to `step`, from which the run resumes; 0 starts a new log."""
    if step and path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _logged_step(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in lines))
    return path.open("a" if step else "w", encoding="utf-8", buffering=1)


def no_log() -> TextIO:
    """A log that discards its events, for the ranks other than 0."""
    return open(os.devnull, "w")


def _logged_step(line: str) -> float:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return json.loads(line).get("step", math.inf)
    return math.inf  # the incomplete last line of a process that was killed


def log_step(lines: TextIO, step: int, of: int, loss: float | None) -> None:
    """Log an optimiser step: its number, the number of steps, and the last logged loss."""
    log(lines, step=step, of=of, loss=loss)


def log(lines: TextIO, **event: Any) -> None:
    """Log one event with its time."""
    lines.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")


def write_bad_batch(folder: Path, trainer: Any, ids: list[str] | None) -> Path:
    """Write bad_batch.json: the ids and model inputs of the examples in the step that stopped a run.

    ids: of the training examples; None for a stream, whose examples are numbered.
    """
    step = max(trainer.state.global_step, 1)
    dataset = trainer.train_dataset
    if ids is None:
        size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
        first = (step - 1) * size
        found = enumerate(itertools.islice(dataset, first, first + size), first)
    else:
        found = ((ids[index], dataset[index]) for index in trainer.examples_of_step(step))
    examples = [
        {"id": one, **{k: v for k, v in example.items() if isinstance(v, (list, int, float, str))}}
        for one, example in found
    ]
    path = folder / "bad_batch.json"
    write_json(path, {"step": step, "examples": examples})
    return path


def last_line(path: Path) -> bytes:
    """Return the last complete line of a log that is being written; empty if there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(os.fstat(log.fileno()).st_size - 65_536, 0))
            return log.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    except OSError:
        return b""
