"""Which runs of a comparison are kept, and in what order the others are given to the executor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from peft_recipes.comparison.chunks import by_seed, has_ended, is_paused, report_paused
from peft_recipes.comparison.executors import Executor
from peft_recipes.comparison.orders import Job, Order
from peft_recipes.runs.folder import read_run, signature


class Schedule:
    """The runs that a comparison may need, trained when they are asked for, each once in a call.

    jobs: all of them; their places are the numbers that the user sees. order: makes the order of a job and its number.
    fingerprint: of the data. on_event: called with each run as it ends or pauses, before the next one starts in its
    place, and with None a few times a second while none does. pauses: the steps at which every run pauses, so that the
    arms take turns; None: each is trained from its start to its end.
    """

    def __init__(
        self,
        executor: Executor,
        jobs: Sequence[Job],
        order: Callable[[Job, int], Order],
        fingerprint: str,
        on_event: Callable[[Order | None], None] = lambda order: None,
        pauses: Sequence[int] | None = None,
    ) -> None:
        self.jobs, self._executor, self._order, self._fingerprint = list(jobs), executor, order, fingerprint
        self._on_event, self._done, self._pauses = on_event, set[Job](), pauses

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of the jobs that have to be trained."""
        return [job for job in jobs if job not in self._done and not self._is_kept(self._order_of(job))]

    def train(self, jobs: Iterable[Job]) -> None:
        """Train the missing ones; return when all have ended, each reported and with its run.json."""
        orders, missing = [self._order_of(job) for job in jobs if job not in self._done], []
        for order in orders:
            if self._is_kept(order):
                order.report("kept")
            else:
                missing.append(order)
        if self._pauses is None:
            self._run(missing)
        else:
            for group in by_seed(missing):
                self._take_turns([replace(order, turns=True) for order in group])
        self._done.update(order.job for order in orders)

    def _take_turns(self, orders: list[Order]) -> None:
        """Train the runs chunk by chunk, in each chunk one after another."""
        for pause in (*self._pauses, None):
            turn = [replace(order, pause_at=pause) for order in orders]
            due = [order for order in turn if order.overwrite or not (is_paused(order) and report_paused(order))]
            self._run(due)
            # From here on the checkpoints are those of this call.
            orders = [replace(order, overwrite=False) for order in turn if not has_ended(order)]

    def _run(self, orders: Iterable[Order]) -> None:
        """Train these to their end, or to their pause."""
        for order in orders:
            self._executor.submit(order)
        for ended in self._executor.finished():
            self._on_event(ended)

    def _order_of(self, job: Job) -> Order:
        order = self._order(job, self.jobs.index(job) + 1)
        order = replace(order, signature=signature(order.recipe, *job, self._fingerprint))
        return replace(order, finished=partial(_can_be_kept, order))

    @staticmethod
    def _is_kept(order: Order) -> bool:
        return not order.overwrite and _can_be_kept(order)


def _can_be_kept(order: Order) -> bool:
    """Whether the folder holds a finished run of the same recipe, data, code and number of processes."""
    run = read_run(order.folder)
    if run is None or not run.ok or run.data.get("signature") != order.signature:
        return False
    environment, launch = run.data["environment"], order.launch
    wanted = (launch.processes, launch.shares(order.recipe.arms.get(order.job[0]))) if launch else (1, None)
    return (environment.get("processes", 1), environment.get("distributed")) == wanted
