"""What is known of a comparison's runs while they are trained: how far each is, and how long the others will take.

`Live` sees every progress report before the caller's `on_progress` does. provisional.py writes the table from it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from peft_recipes.comparison.orders import Job, Progress
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import BASE, GIVEN_UP, Run, read_run, run_folder, unfinished
from peft_recipes.runs.progress import read_progress

FINISHED = ("ok", "kept", "failed", "out-of-memory")  # with a run.json
ENDED = (*FINISHED, *GIVEN_UP)
_TRAINING = ("", "train")  # stages whose steps are the optimizer's; others count answers
_EARLY = 0.25  # share of its steps: a run whose first report is later goes on from a checkpoint


@dataclass
class _Known:
    """What is known of one run.

    spent: seconds that it was trained in this call, until `since` if it is running. start: the step where that began.
    """

    state: str = "pending"
    step: int = 0
    of: int = 0
    start: int | None = None
    spent: float = 0.0
    since: float | None = None
    validation: list[dict[str, Any]] = field(default_factory=list)

    def seconds(self, now: float) -> float:
        return self.spent + (now - self.since if self.since is not None else 0.0)

    def total(self, now: float) -> float | None:
        """Seconds of the whole run by the steps that were trained in this call; None where that says nothing."""
        steps = self.step - (self.start or 0)
        seconds = self.seconds(now)
        return seconds * self.of / steps if self.of and 0 < steps <= self.of and seconds > 0 else None

    def left(self, total: float, now: float) -> float:
        """Seconds until its end, of a run that takes `total` from its start."""
        if self.start and self.of:  # it goes on from an earlier call
            return total * max(self.of - self.step, 0) / self.of
        return max(total - self.seconds(now), 0.0)

    def enter(self, state: str, now: float) -> None:
        self.spent, self.since = self.seconds(now), now if state == "running" else None
        self.state = state


class Live:
    """The state of the runs of one call of `compare`.

    jobs: returns the runs that are planned, which may change. at_once: how many are trained at a time. Called from the
    comparison's thread, and read from that of `--watch`.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        jobs: Callable[[], Sequence[Job]],
        at_once: int = 1,
        on_progress: Callable[[Progress], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._recipe, self._output, self._jobs, self._at_once = recipe, output, jobs, at_once
        self._on_progress, self._clock = on_progress, clock
        self._known: dict[Job, _Known] = {}

    def grow(self, recipe: Recipe) -> None:
        """Take in the recipe with an arm that was added."""
        self._recipe = recipe

    def see(self, progress: Progress) -> None:
        """Take down what a report says of its run, and pass it on with the run's values of the metric."""
        arm = progress.job[0]
        if arm == BASE or arm in self._recipe.arms:  # not the judge's
            known = self._known.setdefault(progress.job, _Known())
            if progress.state != known.state:
                known.enter(progress.state, self._clock())
            if progress.steps and progress.stage in _TRAINING:
                known.step, known.of = progress.step, progress.steps
                if known.start is None:  # the first step that is reported may be any, and mostly is an early one
                    late = progress.step > _EARLY * progress.steps
                    resumed = not known.spent if progress.state == "paused" else late
                    known.start = progress.step if resumed else 0
            if progress.state == "kept":
                known.spent = self._recorded_seconds(progress.job)
            if progress.state in (*FINISHED, "paused"):
                progress = self._with_values(progress, known)
        if self._on_progress is not None:
            self._on_progress(progress)

    def has_ended(self, job: Job) -> bool:
        """Whether a run has its figures, or is known to get none, in this call."""
        return job in self._known and self._known[job].state in ENDED

    def knows(self, job: Job) -> bool:
        """Whether anything was reported of a run in this call."""
        return job in self._known

    @property
    def begun(self) -> bool:
        """Whether a run was trained in this call, to its end or to a pause."""
        return any(known.state in (*ENDED, "paused") and known.state != "kept" for known in self._known.values())

    def run(self, job: Job) -> Run:
        """A run as it is now: finished, failed, or unfinished. What an earlier call left is not this call's run."""
        folder = run_folder(self._output, self._recipe, *job)
        known = self._known.get(job, _Known())
        if known.state in FINISHED and (run := read_run(folder)) is not None:
            return run
        state = known.state if known.state not in FINISHED else "pending"
        position = {"step": known.step, "of": known.of, "validation": known.validation}
        return Run(folder, unfinished(*job, state, **position))

    def provisional(self) -> dict[str, Any]:
        """`provisional` of comparison.json, as of now."""
        jobs, written = list(self._jobs()), datetime.now(timezone.utc)
        left = self.expected_seconds()
        return {
            "written_at": written.isoformat(timespec="seconds"),
            "finished": sum(map(self.has_ended, jobs)),
            "of": len(jobs),
            "expected_seconds": None if left is None else round(left, 1),
            "expected_end": None if left is None else (written + timedelta(seconds=left)).isoformat(timespec="seconds"),
            "runs": [self._entry(job) for job in jobs],
        }

    def expected_seconds(self) -> float | None:
        """Seconds until the last run has ended, by the time of finished ones; None while nothing is known.

        A run takes as long as those of its arm, an arm of which none is finished as long as the others.
        """
        now, jobs = self._clock(), list(self._jobs())
        by_arm: dict[str, list[float]] = {}
        for job in jobs:
            if (total := self._total_seconds(job, now)) is not None:
                by_arm.setdefault(job[0], []).append(total)
        typical = {arm: sum(totals) / len(totals) for arm, totals in by_arm.items()}
        others = [seconds for arm, seconds in typical.items() if arm != BASE]  # the base is not trained
        left = []
        for job in jobs:
            if self.has_ended(job):
                continue
            expected = typical.get(job[0], sum(others) / len(others) if others else None)
            if expected is None:
                return None
            left.append(self._known.get(job, _Known()).left(expected, now))
        running = sum(known.state == "running" for known in list(self._known.values()))
        return max(sum(left) / max(self._at_once, running), max(left)) if left else 0.0

    def _total_seconds(self, job: Job, now: float) -> float | None:
        """Seconds of a finished run, or those of one under way by its steps; None where nothing is known."""
        known = self._known.get(job, _Known())
        if known.state in ("ok", "kept"):
            return (known.total(now) if known.start else None) or known.seconds(now) or None
        return None if self.has_ended(job) else known.total(now)

    def _entry(self, job: Job) -> dict[str, Any]:
        known = self._known.get(job, _Known())
        last = known.validation[-1] if known.validation else None
        values = {key: value for key, value in last.items() if key != "step"} if last else None
        place = {"step": known.step or None, "of": known.of or None}
        return {"arm": job[0], "seed": job[1], "state": known.state, **place, "validation": values}

    def _recorded_seconds(self, job: Job) -> float:
        """Seconds of a run that an earlier call trained, as its run.json says."""
        with contextlib.suppress(RecipeError):
            run = read_run(run_folder(self._output, self._recipe, *job))
            return ((run.data.get("seconds") or {}).get("total") or 0.0) if run is not None else 0.0
        return 0.0

    def _with_values(self, progress: Progress, known: _Known) -> Progress:
        """The report of a finished or paused run with its values of the metric."""
        names = {"metric": self._recipe.metric, "selection_metric": self._recipe.selection_metric}
        folder = run_folder(self._output, self._recipe, *progress.job)
        if progress.state == "paused":
            known.validation = (read_progress(folder) or {}).get("validation") or []
            last = known.validation[-1] if known.validation else {}
            return replace(progress, **names, validation=last.get(self._recipe.selection_metric))
        with contextlib.suppress(RecipeError):
            if (run := read_run(folder)) is not None and run.ok:
                known.validation = list((run.data.get("training") or {}).get("validation") or [])
                test, validation = (run.metrics.get(split) or {} for split in ("test", "validation"))
                values = {"test": test.get(names["metric"]), "validation": validation.get(names["selection_metric"])}
                return replace(progress, **names, **values)
        return progress
