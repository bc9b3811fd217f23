"""`Order`, one run to be trained, and `Progress`, what is reported of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.distributed.launch import Launch
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import run_folder

Job = tuple[str, int]  # arm, seed

SILENT_SECONDS = 120  # without a new log line, after which a run's process is reported as silent


@dataclass(frozen=True)
class Progress:
    """The state of one run of a comparison, as passed to `on_progress`.

    test: of a finished run, its value of the comparison's `metric` on the test split. validation: its last value of
    `selection_metric` on the validation split, also of a run that is paused. None where there is none.
    """

    job: Job
    number: int
    jobs: int
    state: str  # "pending", "running", "paused", "ok", "failed", "out-of-memory", "kept", "dropped", "stopped"
    step: int = 0
    steps: int = 0
    stage: str = ""
    silent_seconds: int = 0  # since its last log line, once that is long ago
    error: str = ""
    note: str = ""  # for the user, whatever the state
    metric: str = ""
    selection_metric: str = ""
    test: float | None = None
    validation: float | None = None


@dataclass(frozen=True)
class Order:
    """One run to be trained in a process of its own; under a launch, in several.

    yaml: the resolved recipe. number: of the `jobs` of the comparison. data: the folder of the comparison's prepared
    data. overwrite: ignore the checkpoints of an earlier run. signature: of the run to be trained, if known. finished:
    whether the folder holds this run, finished; called again once the folder is locked. memory_bytes: of its process,
    by the plan; 0 where it is not known. pause_at: the optimizer step at which the run pauses; None: it goes on to its
    end. turns: whether the run takes turns with others, in which case its process may be one that trains them as well.
    """

    output: Path
    recipe: Recipe
    job: Job
    yaml: Path
    number: int = 1
    jobs: int = 1
    on_progress: Callable[[Progress], None] | None = None
    data: Path | None = None
    overwrite: bool = False
    launch: Launch | None = None
    signature: str = ""
    finished: Callable[[], bool] | None = None
    memory_bytes: int = 0
    pause_at: int | None = None
    turns: bool = False

    @property
    def folder(self) -> Path:
        return run_folder(self.output, self.recipe, *self.job)

    def report(self, state: str, **details: Any) -> None:
        """Pass the run's state to `on_progress`."""
        if self.on_progress is not None:
            self.on_progress(Progress(self.job, self.number, self.jobs, state, **details))


class Follower:
    """Reports a run's progress from the lines of its log."""

    def __init__(self, order: Order):
        self._order, self._line, self._changed = order, b"", time.monotonic()
        self._position: dict[str, Any] = {}

    def see(self, line: bytes) -> None:
        """Report the log's last line if it is new; if not, and it has not changed for long, that the run is silent."""
        if line not in (b"", self._line):
            self._line, self._changed = line, time.monotonic()
            with contextlib.suppress(ValueError):  # the log was cut off by a full disk
                entry = json.loads(line)
                self._position = {
                    "step": entry.get("step", 0),
                    "steps": entry.get("of", 0),
                    "stage": entry.get("stage", "train"),
                }
                self._order.report("running", **self._position)
        elif (silence := int(time.monotonic() - self._changed)) >= SILENT_SECONDS:
            self._order.report("running", **self._position, silent_seconds=silence)
