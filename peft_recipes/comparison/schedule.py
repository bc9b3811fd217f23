"""Which runs of a comparison are kept, and in what order the others are given to the executor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from peft_recipes.comparison.chunks import by_seed, has_ended, is_paused, report_paused
from peft_recipes.comparison.executors import Executor
from peft_recipes.comparison.orders import Job, Order, Progress
from peft_recipes.runs.checkpoints import FOLDER as CHECKPOINTS
from peft_recipes.runs.checkpoints import newest
from peft_recipes.runs.folder import read_run, signature
from peft_recipes.runs.progress import read_progress


class Schedule:
    """The runs that a comparison may need, trained when they are asked for, each once in a call.

    jobs: all of them; their places are the numbers that the user sees. order: makes the order of a job and its number.
    fingerprint: of the data. on_event: called with each run as it ends or pauses, before the next one starts in its
    place, and with None a few times a second while none does. pauses: the steps at which every run pauses, so that the
    arms take turns; None: each is trained from its start to its end. on_round: called with the number of a pause and
    the runs of a seed, once all of them have reached it. done: the runs that were kept or have ended. stopped: the arms
    of which nothing more is trained, with the state of their runs. share: trains those of the orders that can be
    trained together, before the others (shared_runs.py).
    """

    def __init__(
        self,
        executor: Executor,
        jobs: Sequence[Job],
        order: Callable[[Job, int], Order],
        fingerprint: str,
        on_event: Callable[[Order | None], None] = lambda order: None,
        pauses: Sequence[int] | None = None,
        on_round: Callable[[int, Sequence[Order]], None] = lambda number, orders: None,
        share: Callable[[Sequence[Order], Callable[[Order], bool]], Iterator[Order | None]] = lambda *_: iter(()),
    ) -> None:
        self.jobs, self._executor, self._order, self._fingerprint = list(jobs), executor, order, fingerprint
        self.on_event, self.on_round, self._pauses, self._share = on_event, on_round, pauses, share
        self.done, self.stopped = set[Job](), dict[str, str]()
        self._under_way: dict[Job, Order] = {}  # planned, and not ended
        self._to_come: dict[Job, Order] = {}  # planned, while others or they themselves are trained together
        self._groups: list[list[Order]] = []  # of them, those that wait to take turns
        self._steps: dict[Job, tuple[int, int]] = {}  # of the runs that were started: the last step, and their number

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of the jobs that have to be trained."""
        wanted = [job for job in jobs if job not in self.done and job[0] not in self.stopped]
        return [job for job in wanted if not self._is_kept(self._order_of(job))]

    def train(self, jobs: Iterable[Job]) -> None:
        """Train the missing ones; return when all have ended, each reported and with its run.json."""
        jobs = list(jobs)
        self._train_shared(jobs)
        self._plan(jobs)
        if self._pauses is None:
            self._follow()
            return
        while self._groups:  # `extend` adds some
            self._take_turns(self._groups.pop(0))

    def under_way(self, arm: str) -> list[Job]:
        """The runs of an arm that are planned and have not ended."""
        return [job for job in {**self._to_come, **self._under_way} if job[0] == arm]

    def is_shared(self, arm: str) -> bool:
        """Whether a run of an arm is being trained in a process with others, where it can't be stopped alone."""
        return any(job[0] == arm and job in self._steps for job in self._to_come)

    def stop(self, arm: str, state: str = "stopped") -> tuple[Job, int, int] | None:
        """Train no more of an arm: end its runs under way, whose checkpoints are kept, and report this state of them.

        One that has its figures already, and is being verified, goes on to its end. Returns the run that was ended,
        with its last step and the number of its steps; where none had begun, the next one and zeros; None where there
        was none.
        """
        self.stopped[arm] = state
        orders = [self._under_way.get(job) or self._to_come[job] for job in self.under_way(arm)]
        orders = [order for order in orders if not (order.job in self._steps and _can_be_kept(order))]
        for order in reversed(orders):  # those that wait before one that runs
            self._to_come.pop(order.job, None)
            if self._under_way.pop(order.job, None) is not None:
                self._executor.cancel(order)
            if order.job in self._steps and _can_be_kept(order):  # it has just ended
                self.done.add(order.job)
            order.report("ok" if order.job in self.done else state)
        ended = [(order.job, *self._last_step(order)) for order in orders if order.job not in self.done]
        return max(ended, key=lambda each: each[1], default=None)  # of those that had not begun the first

    def extend(self, jobs: Sequence[Job]) -> None:
        """Train more runs after those that are planned, while `train` is under way; those of a stopped arm again."""
        for arm, _ in jobs:
            self.stopped.pop(arm, None)
        self.jobs += [job for job in jobs if job not in self.jobs]
        self._plan(jobs)
        for order in (self._under_way[job] for job in jobs if job in self._under_way):
            order.report("pending")

    def withdraw(self, arm: str) -> None:
        """Undo `extend` by the runs of an arm that none of the machines has room for."""
        self.stop(arm)
        self.stopped.pop(arm, None)
        self.jobs = [job for job in self.jobs if job[0] != arm]

    def _plan(self, jobs: Iterable[Job]) -> None:
        missing = []
        for order in [self._order_of(job) for job in jobs if job not in self.done and job not in self._under_way]:
            if self._is_kept(order):
                order.report("kept")
                self.done.add(order.job)
            elif order.job[0] in self.stopped:
                order.report(self.stopped[order.job[0]])
            else:
                missing.append(order)
        if self._pauses is None:
            self._submit(missing)
        else:
            missing = [replace(order, turns=True) for order in missing]
            self._under_way |= {order.job: order for order in missing}
            self._groups += by_seed(missing)

    def _train_shared(self, jobs: Iterable[Job]) -> None:
        """Train together what can be; a run that does not end there is left to the executor."""
        orders = [self._order_of(job) for job in self.missing(jobs)]
        self._to_come = {order.job: order for order in orders}
        for ended in self._share(orders, lambda order: order.job in self._to_come):
            if ended is not None:
                self.done.add(ended.job)
                self._to_come.pop(ended.job, None)
            self.on_event(ended)
        self._to_come = {}

    def _take_turns(self, orders: Sequence[Order]) -> None:
        """Train the runs chunk by chunk, in each chunk one after another."""
        for number, pause in enumerate((*self._pauses, None), 1):
            turn = [replace(order, pause_at=pause) for order in orders if order.job in self._under_way]
            due = [order for order in turn if order.overwrite or not (is_paused(order) and report_paused(order))]
            self._submit(due)
            self._follow()
            orders = [order for order in turn if order.job in self._under_way]
            # What was begun in this call has its checkpoints.
            orders = [replace(order, overwrite=order.overwrite and order.job not in self._steps) for order in orders]
            if pause is not None and orders:
                self.on_round(number, orders)

    def _submit(self, orders: Iterable[Order]) -> None:
        for order in orders:
            self._executor.submit(order)
            self._under_way[order.job] = order

    def _follow(self) -> None:
        """Wait until all that were submitted have ended or are paused."""
        for ended in self._executor.finished():
            if ended is not None and (ended.pause_at is None or has_ended(ended)):
                self.done.add(ended.job)
                self._under_way.pop(ended.job, None)
            self.on_event(ended)

    def _last_step(self, order: Order) -> tuple[int, int]:
        """The last step of a run that was ended, by its log, checkpoint or pause, and the number of its steps."""
        if order.overwrite and order.job not in self._steps:
            return 0, 0
        step, of = self._steps.get(order.job, (0, 0))
        progress = read_progress(order.folder, order.signature) or {"step": 0, "of": 0}
        checkpoint, _ = newest(order.folder / CHECKPOINTS, order.signature)
        of = of or progress["of"]
        return (max(step, progress["step"], checkpoint.step if checkpoint else 0), of) if of else (0, 0)

    def _order_of(self, job: Job) -> Order:
        order = self._order(job, self.jobs.index(job) + 1)
        order = replace(order, signature=signature(order.recipe, *job, self._fingerprint))
        if job in self._steps:  # what it has written in this call is its own
            order = replace(order, overwrite=False)
        return replace(order, finished=partial(_can_be_kept, order), on_progress=partial(self._see, order.on_progress))

    def _see(self, then: Callable[[Progress], None] | None, progress: Progress) -> None:
        if progress.state in ("running", "paused"):
            last = self._steps.setdefault(progress.job, (0, 0))
            self._steps[progress.job] = (progress.step, progress.steps) if progress.steps else last
        if then is not None:
            then(progress)

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
