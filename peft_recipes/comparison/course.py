"""`Course`: the runs of one call of `compare` while they are trained, and what may change them meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft_recipes.comparison.adapter_checks import check_adapters
from peft_recipes.comparison.by_hand import ByHand, Team, check_added
from peft_recipes.comparison.changes import Changes
from peft_recipes.comparison.chunks import pause_steps
from peft_recipes.comparison.collecting import run_or_failure, runs_of
from peft_recipes.comparison.dropping import Dropping
from peft_recipes.comparison.executors import Executor
from peft_recipes.comparison.judging import judge_runs
from peft_recipes.comparison.live import Live
from peft_recipes.comparison.orders import Job, Order, Progress
from peft_recipes.comparison.provisional import Provisional
from peft_recipes.comparison.requests import taking_requests
from peft_recipes.comparison.schedule import Schedule
from peft_recipes.comparison.shared_runs import SharedRuns
from peft_recipes.comparison.until_decided import Design, Until, add_seeds, looked_at_before
from peft_recipes.distributed.launch import Launch
from peft_recipes.planning.plan import steps
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import BASE
from peft_recipes.training.resolve import Resolved


class Course:
    """The runs of one call, in the order in which they are planned: the base, then seed by seed every arm.

    team: the arms, of which `peft-recipes add` makes more. data: the folder of the prepared data. chunks: in how many
    equal shares of their steps the arms take turns. at_once: how many runs are trained at a time. design: of seeds that
    are added until it is decided. shared: trains adapters together on one base.
    """

    def __init__(
        self,
        executor: Executor,
        resolved: Resolved,
        team: Team,
        output: Path,
        data: Path | None,
        *,
        changes: Changes,
        design: Design | None = None,
        chunks: int = 1,
        at_once: int = 1,
        shared: SharedRuns | None = None,
        launch: Launch | None = None,
        overwrite: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        self.team, self._executor, self._changes, self._design, self._shared = team, executor, changes, design, shared
        self._output, self._data, self._launch, self._overwrite = output, data, launch, overwrite
        self.folder, self.base = output / team.recipe.name, (BASE, team.seeds[0])
        # The untrained base is evaluated: about an arm's step without gradients and optimizer.
        without = [each["total"] - each["gradients"] - each["optimizer"] for each in team.estimates.values()]
        self._base_memory = max(without)
        self._pauses = None if chunks == 1 else pause_steps(steps(team.recipe, resolved.prepared.rows), chunks)
        jobs: list[Job] = [self.base, *((arm, seed) for seed in team.seeds for arm in team.names)]
        options = {"pauses": self._pauses, **({"share": shared.train} if shared else {})}
        self.runs = Schedule(executor, jobs, self._order, resolved.fingerprint, **options)
        self.runs.stopped |= changes.states
        self.live = Live(team.recipe, output, self.wanted, at_once, on_progress)

    @property
    def yaml(self) -> Path:
        """The resolved recipe, which the runs read."""
        return self.folder / "recipe.yaml"

    @property
    def seeds(self) -> list[int]:
        """The seeds of the table: of a design those that an arm got."""
        if self._design is None:
            return list(self.team.seeds)
        return self._design.run_seeds or list(self._design.plan.seeds[:1])  # none where full was stopped at once

    @property
    def halted(self) -> dict[Job, dict[str, Any]]:
        """The runs that were not trained to their end since their arm was stopped, with how far they are."""
        return self._changes.halted(
            [job for job in self.runs.jobs if job[1] in self.seeds and job not in self.runs.done]
        )

    def wanted(self) -> list[Job]:
        """The runs that the comparison may still need, and those that it has."""
        design, stopped = self._design, self.runs.stopped
        if design is None:
            return self.runs.jobs
        needed = (job for job in self.runs.jobs if job == self.base or design.may_need(*job))
        return [job for job in needed if job[0] not in stopped or self.live.knows(job)]

    def train(self, provisional: Provisional, until: Until | None = None, drop: bool = False) -> list[str]:
        """Train all runs, reload the adapters, and return notes for the comparison's readers.

        Meanwhile, take the requests of `peft-recipes stop` and `add`, and let `provisional` write the table so far.
        drop: stop the arms that are surely behind.
        """
        notes = []
        with taking_requests(self.folder) as inbox:
            check = partial(check_added, self._executor, self._launch, self.folder, self._data)
            grow = partial(provisional.grow, self.team)
            by_hand = ByHand(self.team, self.runs, self._changes, inbox, self.yaml, check, self._design, grow)

            def on_event(ended: Order | None) -> None:
                by_hand.take_requests()
                provisional.ended(ended)

            self.runs.on_event = on_event
            if drop:
                self.runs.on_round = Dropping(self.team, self.runs, self._changes, self._pauses).after_round
            if self._design is None:
                self.runs.train(self.runs.jobs)
                notes += looked_at_before(self.folder)
            else:
                self._add_seeds(self._design, until)
        self._executor.rest()
        halted = {arm for arm, _ in self.halted}
        notes += [
            *(self._shared.notes if self._shared else []),
            *self.team.notes,
            *self._changes.notes(self.team.names, halted),
        ]
        trained = [(arm, seed) for arm, seed in self.runs.jobs if seed in self.seeds]
        check_adapters(self._output, self.team.recipe, trained)
        return notes

    def _add_seeds(self, design: Design, until: Until) -> None:
        read, runs = partial(run_or_failure, self._output, self.team.recipe), self.runs
        look = partial(_look, self.team.recipe, self._output, self.base)
        add_seeds(design, until, runs.missing, lambda jobs: runs.train([self.base, *jobs]), read, look, runs.stopped)

    def _order(self, job: Job, number: int) -> Order:
        base = job == self.base
        memory = self._base_memory if base else self.team.estimates.get(job[0], {}).get("total", 0)
        return Order(
            self._output,
            self.team.recipe,
            job,
            self.yaml,
            number,
            len(self.runs.jobs),
            self.live.see,
            data=self._data,
            overwrite=self._overwrite,
            launch=self._launch,
            memory_bytes=memory,
        )


def _look(recipe: Recipe, output: Path, base: Job, design: Design) -> dict[str, Any]:
    """The differences of the arms from full by the seeds that each has so far, at a look of `design`."""
    from peft_recipes.statistics.differences import differences

    arms, seeds = design.data["arms"], design.run_seeds
    runs = runs_of(output, recipe, arms, seeds, design, {})
    judge_runs(recipe, runs, run_or_failure(output, recipe, base), output / recipe.name)
    return differences(recipe, runs, arms, seeds, plan=design.plan)
