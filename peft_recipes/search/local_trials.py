"""The short runs of a scan in several processes of this machine: `Trials` (trials.py).

Each process (trial_worker.py) prepares the data once and does one run after another. The arms are trained at the same
time; the runs of one arm follow one another, since halving compares them.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft_recipes.comparison import forking
from peft_recipes.comparison.processes import start
from peft_recipes.comparison.run_folders import failure
from peft_recipes.comparison.worker import needs_bitsandbytes
from peft_recipes.distributed.jobs import job_environments
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import device_of
from peft_recipes.runs.files import write_json
from peft_recipes.runs.subprocesses import Process
from peft_recipes.search.own_process import write_recipe
from peft_recipes.search.trials import FOLDER, Ended, Scanned, Trial, failed_entry

_POLL_SECONDS = 0.05


class LocalTrials:
    """Trains trials in up to `jobs` processes of this machine."""

    def __init__(self, scanned: Scanned, jobs: int):
        self._scanned, self._stack, self._waiting = scanned, ExitStack(), list[Trial]()
        self._folder = scanned.folder.absolute() / FOLDER
        self._recipe, arms = self._folder / "recipe.yaml", [one.name for one in scanned.candidates]
        slots = job_environments(jobs, device_of(scanned.recipe.training))
        self._workers = [_Worker(self._folder / str(i), self._recipe, arms, slot) for i, slot in enumerate(slots)]
        self.note = f"{jobs} runs at a time shared this machine: the seconds are of that."

    def __enter__(self) -> LocalTrials:
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        write_recipe(self._scanned.recipe, self._scanned.candidates, self._recipe)
        if forking.can_fork():
            forking.prepare()
        for worker in self._workers:
            self._stack.callback(worker.end)  # at once, also after Ctrl-C: there is no checkpoint to wait for
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def at_a_time(self) -> int:
        return len(self._workers)

    def submit(self, trial: Trial) -> None:
        self._waiting.append(trial)

    def finished(self) -> Iterator[Ended]:
        budget = self._scanned.budget
        while self._waiting or any(worker.trial for worker in self._workers):
            for worker in [worker for worker in self._workers if worker.trial is None]:
                while self._waiting and worker.trial is None:
                    trial = self._waiting.pop(0)
                    if budget.left <= max(trial.expected, 0):
                        yield trial, None
                    else:
                        worker.begin(trial, budget.left)
            time.sleep(_POLL_SECONDS)
            for worker in [worker for worker in self._workers if worker.trial is not None]:
                trial, entry = worker.trial, worker.result()
                if entry is None and budget.is_overdue:
                    worker.end()
                if entry is not None or budget.is_overdue:
                    worker.trial = None
                    yield trial, entry


class _Worker:
    """A process that does runs. trial: its current one; the process starts with the first."""

    def __init__(self, folder: Path, recipe: Path, arms: list[str], environment: dict[str, str]):
        self.trial: Trial | None = None
        self._folder, self._recipe, self._arms, self._environment = folder, recipe, arms, environment
        self._process: Process | None = None
        self._number = 0

    def begin(self, trial: Trial, seconds: float) -> None:
        """Begin a trial. seconds: left of the budget."""
        self.trial = trial
        if self._process is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()
            self._number = 0
        write_json(self._order, trial.options(seconds) | {"ends_at": time.time() + seconds})
        if self._process is None:
            words = ["serve", str(self._recipe), str(self._folder), *self._arms]
            fork = not any(needs_bitsandbytes(self._recipe, arm) for arm in self._arms)
            command = [sys.executable, "-m", "peft_recipes.search.trial_worker", *words]
            self._process = start(command, self._log, self._environment, fork=fork)

    @property
    def _order(self) -> Path:
        return self._folder / f"{self._number}.json"

    @property
    def _log(self) -> Path:
        return self._folder / "log.txt"

    def result(self) -> dict[str, Any] | None:
        """The trial's entry of scan.json; None while it goes on. Raises RecipeError for a mistake in the recipe."""
        path = self._order.with_suffix(".result.json")
        code = self._process.poll()
        if path.exists():
            self._number += 1
            return json.loads(path.read_text(encoding="utf-8"))
        if code is None:
            return None
        self.end()
        if code == 2:
            raise RecipeError(*self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:])
        return failed_entry(self.trial.learning_rate, failure(code, self._log)["error"])

    def end(self) -> None:
        """End the process and wait for its end; the next trial starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process = None
