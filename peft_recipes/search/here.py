"""The short runs of a scan one after another in this process: `Trials` (trials.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.runs.checkpoints import disk_full
from peft_recipes.search.halving import keep_training, run_entry
from peft_recipes.search.trials import Ended, Trial, failed_entry

if TYPE_CHECKING:
    from peft_recipes.search.budget import Budget
    from peft_recipes.search.preparation import Preparation


class Here(AbstractContextManager):  # type: ignore[type-arg]
    """Trains trials in this process, with the data that the scan has prepared. A step or an evaluation is not cut."""

    note = ""

    def __init__(self, prepared: Preparation, budget: Budget):
        self._prepared, self._budget, self._waiting = prepared, budget, deque[Trial]()

    def __exit__(self, *_: Any) -> None:
        self._waiting.clear()

    def at_a_time(self) -> int:
        return 1

    def submit(self, trial: Trial) -> None:
        self._waiting.append(trial)

    def finished(self) -> Iterator[Ended]:
        while self._waiting:
            trial = self._waiting.popleft()
            begins = self._budget.left > 0 and trial.expected <= self._budget.left
            yield trial, train(self._prepared, trial, self._budget.deadline) if begins else None


def train(prepared: Preparation, trial: Trial, deadline: float) -> dict[str, Any]:
    """Train one trial in this process; return its entry of scan.json. Raises RecipeError.

    deadline: on the clock of time.monotonic; no step starts after it.
    """
    try:
        run = prepared.train(trial, keep_training=lambda run: keep_training(run, trial.others), deadline=deadline)
        return run_entry(run)
    except RecipeError:
        raise
    except Exception as error:
        if disk_full(error):
            raise
        return failed_entry(trial.learning_rate, f"{type(error).__name__}: {error}")
