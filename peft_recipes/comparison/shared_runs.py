"""`--share-base`: train runs of a comparison together in one process on one base, before the others run alone.

The first seed of every arm is trained alone, unless `--measure` takes times and memory anyway: those figures of a run
that shared its steps say nothing of the arm. What shares a base is split into groups that fit the machine's memory,
each a process of its own (shared_worker.py). A run that does not end in its group's process is left to the executor,
which goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.comparison import pool
from peft_recipes.comparison.orders import Follower, Order
from peft_recipes.comparison.places import LOCAL
from peft_recipes.comparison.processes import start
from peft_recipes.comparison.run_folders import clear_folder, conclude
from peft_recipes.comparison.worker import needs_bitsandbytes
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import device_of
from peft_recipes.planning.together import Room
from peft_recipes.runs.folder import BASE, read_run
from peft_recipes.runs.log import last_line
from peft_recipes.runs.subprocesses import Process, ending_together

_LOG = "shared-base.txt"  # what a group's process prints, in the comparison's folder; kept where it failed

# A joint pass keeps more than the runs alone: four runs of SmolLM2-135M on Alpaca's lengths, batch 8, took 23 GB on a
# CPU, where their own parts add up to 9.
_JOINT = 2.5


@dataclass
class SharedRuns:
    """The runs of a comparison that share a base, and those that don't.

    estimates: the memory of each arm, by the plan. first: the seed that is trained alone; None: all share. notes: what
    a reader of the comparison should know.
    """

    estimates: Mapping[str, Mapping[str, Any]]
    first: int | None
    notes: list[str] = field(default_factory=list)

    def train(
        self, orders: Sequence[Order], wanted: Callable[[Order], bool] = lambda order: True
    ) -> Iterator[Order | None]:
        """Train those of the orders that can share a base; yield each that has ended, and None while none has.

        wanted: whether an order is still to be trained, asked before its group starts.
        """
        for planned in self._groups([order for order in orders if self._shares(order)]):
            group = [order for order in planned if wanted(order)]
            if len(group) > 1:
                yield from self._train_group(group)

    def _shares(self, order: Order) -> bool:
        from peft_recipes.training.together import why_alone

        arm, seed = order.job
        if arm == BASE or seed == self.first:
            return False
        why = why_alone(order.recipe, order.recipe.arms[arm])
        if (
            why is not None
            and (note := f"--share-base: the runs of '{arm}' are trained alone: {why}.") not in self.notes
        ):
            self.notes.append(note)
        return why is None

    def _groups(self, orders: Sequence[Order]) -> list[list[Order]]:
        """Groups of two or more that fit the memory: the base and the libraries once, everything else run by run."""
        groups: list[list[Order]] = [[]]
        for order in orders:
            if groups[-1] and not self._fits([*groups[-1], order]):
                groups.append([])
            groups[-1].append(order)
        return [group for group in groups if len(group) > 1]

    def _fits(self, orders: Sequence[Order]) -> bool:
        estimates, room = [self.estimates[order.job[0]] for order in orders], Room(device_of(orders[0].recipe.training))
        common = [each["weights"] + each["libraries"] for each in estimates]
        needed = max(common) + _JOINT * sum(each["total"] - own for each, own in zip(estimates, common, strict=True))
        machine = estimates[0]["machine"]
        return machine is None or room.taken([int(needed)]) < machine

    def _train_group(self, orders: Sequence[Order]) -> Iterator[Order | None]:
        log = orders[0].output / orders[0].recipe.name / _LOG
        log.unlink(missing_ok=True)
        for order in orders:
            clear_folder(order)
            order.report("running")
        followers = {order.job: Follower(order) for order in orders}
        with ending_together() as processes:
            processes.append(_started(orders, log))
            while processes[0].poll() is None:
                for order in orders:
                    followers[order.job].see(last_line(order.folder / "log.jsonl"))
                yield None
                time.sleep(0.1)
            code = processes[0].returncode
        ended = [order for order in orders if _has_ended(order)]
        for order in ended:
            conclude(order, code, log)
            yield order
        if left := [order for order in orders if order not in ended]:
            names = ", ".join(f"'{order.job[0]}' seed {order.job[1]}" for order in left)
            self.notes.append(f"--share-base: {names} did not end in the shared process ({log.name}), and ran alone.")
        else:
            log.unlink(missing_ok=True)


def _started(orders: Sequence[Order], log: Path) -> Process:
    first, module = orders[0], "peft_recipes.comparison.shared_worker"
    jobs = json.dumps([order.job for order in orders])
    command = [sys.executable, "-m", module, str(first.yaml), str(first.output), str(first.data or ""), jobs]
    plain = not any(needs_bitsandbytes(order.yaml, order.job[0]) for order in orders)
    return start(command, log, fork=pool.FORK_RUNS and plain)


def _has_ended(order: Order) -> bool:
    """Whether a run has ended, well or with an error of its own; memory that all together lack is no such."""
    run = read_run(order.folder)
    return run is not None and run.data["status"] != "out-of-memory"


def check_shared(seeds: Sequence[int], measure: bool, on: str, launch: Any, chunks: int = 1) -> None:
    """Raise RecipeError where no run can share a base."""
    others = {"--launch": launch is not None, f"--on {on}": on != LOCAL}
    if option := next((name for name, given in others.items() if given), None):
        raise RecipeError(f"--share-base trains several runs in one process of this machine: leave out {option}.")
    if chunks > 1:
        raise RecipeError(
            "--share-base trains runs together from start to end, and with --chunks (or --drop) the arms take turns: "
            "leave out one of them."
        )
    if len(seeds) < 2 and not measure:
        raise RecipeError(
            "--share-base: the first seed of every arm is trained alone, for its time and memory, and there is no "
            "other. Name more with --seeds 0,1,2, or add --measure, which takes these figures apart from training."
        )
