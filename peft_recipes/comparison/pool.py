"""The runs of a comparison on this machine, each in a process of its own, one or several at a time.

Everything here runs in the process that called `compare`. It starts one worker process (worker.py) for each run, and
after the runs one process that reloads the trained adapters (adapters/check_process.py). It reads what they write to
their run folders; nothing is trained or loaded here. No worker outlives this process.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft_recipes.comparison.orders import Follower, Order
from peft_recipes.comparison.processes import start
from peft_recipes.comparison.run_folders import clear_folder, conclude
from peft_recipes.comparison.warm import Turn, WarmProcess, takes_turns
from peft_recipes.comparison.worker import PAUSE_AT, needs_bitsandbytes
from peft_recipes.distributed.jobs import Jobs, job_environments
from peft_recipes.distributed.launch import Launch
from peft_recipes.hardware.device import Hardware, device_of
from peft_recipes.planning.memory import spread_of
from peft_recipes.planning.scaling import Spread
from peft_recipes.planning.together import Room, jobs_for
from peft_recipes.recipe.arm import Arm
from peft_recipes.runs.log import last_line
from peft_recipes.runs.subprocesses import Process, ending_together, interrupt

# A forked run starts 4 s earlier, but its peak memory is another one: it has mapped only those pages of the libraries
# that it touched itself (SmolLM2-135M, LoRA: 546 MB instead of 618). A benchmark sets it.
FORK_RUNS = False

_POLL_SECONDS, _TURN_POLL_SECONDS = 0.1, 0.01


class LocalPool:
    """Trains runs on this machine; an `Executor` (executors.py).

    A fresh process makes a run's peak memory its own, and confines a crash to that run. At most `jobs` run at a time,
    and a run starts only where it fits next to those running on the same device, by its plan. Each has a slot: the
    environment variables that its process gets in addition. Runs that take turns share a process for each slot, which
    is kept while memory allows (warm.py).
    """

    def __init__(self, jobs: Jobs = 1, launch: Launch | None = None):
        self._free, self._launch, self._jobs = [dict[str, str]()] if jobs == 1 else [], launch, jobs
        self._room: Room | None = None  # where several runs share it
        self._waiting: list[Order] = []
        self._working: list[_Worker] = []
        self._warm: dict[int, WarmProcess] = {}  # by the id of their slot
        self._stack = ExitStack()
        self.notes: list[str] = []

    def __enter__(self) -> LocalPool:
        self._answers = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="turns-")))
        self._processes = self._stack.enter_context(ending_together())
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def spread_of(self, arm: Arm | None, hardware: Hardware) -> Spread | None:
        return spread_of(arm, hardware, self._launch)

    def submit(self, order: Order) -> None:
        self._waiting.append(order)

    def cancel(self, order: Order) -> None:
        self._waiting = [each for each in self._waiting if each is not order]
        for worker in [worker for worker in self._working if worker.order is order]:
            interrupt([worker.process])
            self._release(worker)

    def finished(self) -> Iterator[Order | None]:
        if self._jobs != 1 and self._waiting:
            self._make_slots()
        while self._waiting or self._working:
            while (place := self._next_start()) is not None:
                start_process = self._take_turn if takes_turns(place[0]) else self._start
                self._working.append(_Worker(*place, start_process))
            self._wait()
            ended = [worker for worker in self._working if worker.has_ended()]
            if not ended:
                yield None
            for worker in ended:
                if worker in self._working:  # not cancelled while an earlier one was reported
                    self._release(worker)
                    conclude(worker.order, worker.process.returncode)
                    yield worker.order

    def _wait(self) -> None:
        """Wait a tenth of a second, or until a turn ends: one of few steps takes no longer."""
        deadline = time.monotonic() + _POLL_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _TURN_POLL_SECONDS))
            if any(isinstance(worker.process, Turn) and worker.process.poll() is not None for worker in self._working):
                return

    def _make_slots(self) -> None:
        """Settle how many runs are trained at a time, and on which devices; again where more wait than before."""
        device = device_of(self._waiting[0].recipe.training)
        self._room = self._room or Room(device)
        jobs = jobs_for(self._jobs, [order.memory_bytes for order in self._waiting], device)
        if not self._working and jobs > len(self._free):
            self.rest()
            self._free = job_environments(jobs, device)

    def _next_start(self) -> tuple[Order, dict[str, str]] | None:
        """Take the first waiting run that fits next to those running on a free slot's device, and that slot."""

        def running_beside(slot: dict[str, str]) -> list[int]:
            return [each.order.memory_bytes for each in self._working if _same_device(each.slot, slot)]

        idle_first = sorted(self._free, key=lambda slot: len(running_beside(slot)))
        for order, slot in itertools.product(self._waiting, idle_first):
            running = running_beside(slot)
            if self._room is None or self._room.fits(order.memory_bytes, running):
                self._waiting = [each for each in self._waiting if each is not order]
                self._free = [each for each in self._free if each is not slot]  # equal ones have a process each
                return order, slot
        return None

    def _release(self, worker: _Worker) -> None:
        """Forget a worker whose process has ended."""
        self._working.remove(worker)
        if worker.process in self._processes:
            self._processes.remove(worker.process)
        self._free.append(worker.slot)
        worker.close()

    def _start(self, order: Order, slot: dict[str, str]) -> Process:
        """Start a process of the order's own."""
        # In a session of its own, so that Ctrl-C reaches the comparison alone, which then interrupts the worker once.
        # The stdin pipe closes when the comparison's process is killed: the worker (each rank) then ends itself.
        fork = FORK_RUNS and order.launch is None and not needs_bitsandbytes(order.yaml, order.job[0])
        process = start(_command(order), order.folder / "log.txt", slot, fork=fork)
        self._processes.append(process)
        return process

    def _take_turn(self, order: Order, slot: dict[str, str]) -> Process:
        """Let the slot's warm process train the order: the one that is there, or another where it can't."""
        warm = self._warm.get(id(slot))
        if warm is not None and warm.has_room_for(order, device_of(order.recipe.training)):
            with contextlib.suppress(OSError):  # it has ended just now
                return warm.give(order)
        if warm is not None:
            self._end(id(slot))
        warm = self._warm[id(slot)] = WarmProcess(self._answers, order.folder / "log.txt", slot, FORK_RUNS)
        self._processes.append(warm.process)
        return warm.give(order)

    def rest(self) -> None:
        for slot in list(self._warm):
            self._end(slot)

    def _end(self, slot: int) -> None:
        """End the warm process of a slot, which has nothing to do."""
        warm = self._warm.pop(slot)
        warm.end()
        self._processes.remove(warm.process)


def _same_device(slot: dict[str, str], other: dict[str, str]) -> bool:
    return slot.get("CUDA_VISIBLE_DEVICES") == other.get("CUDA_VISIBLE_DEVICES")


class _Worker:
    """The worker process of one run, as seen from the comparison's process."""

    def __init__(self, order: Order, slot: dict[str, str], start_process: Callable[[Order, dict[str, str]], Process]):
        self.order, self.slot, self.folder = order, slot, order.folder
        clear_folder(order)
        order.report("running")
        self._follower = Follower(order)
        (self.folder / "log.txt").unlink(missing_ok=True)
        self.process = start_process(order, slot)

    def has_ended(self) -> bool:
        """Whether the process has ended; reports the run's progress if not."""
        if self.process.poll() is not None:
            return True
        self._follower.see(last_line(self.folder / "log.jsonl"))
        return False

    def close(self) -> None:
        self.process.stdin.close()


def _command(order: Order) -> list[str]:
    """The command of a run's own process."""
    module, (arm, seed) = "peft_recipes.comparison.worker", order.job
    arguments = [str(order.yaml), arm, str(seed), str(order.output), *([str(order.data)] if order.data else [])]
    arguments += [f"{PAUSE_AT}{order.pause_at}"] if order.pause_at is not None else []
    return order.launch.command(module, *arguments) if order.launch else [sys.executable, "-m", module, *arguments]
