"""The runs of a comparison on the nodes of a Ray cluster: an `Executor` (executors.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from peft_recipes.cluster.nodes import RayNodes
from peft_recipes.cluster.pool import Pool
from peft_recipes.cluster.work import Outcome, Work
from peft_recipes.comparison.needed_files import needed_files
from peft_recipes.comparison.orders import Follower, Order
from peft_recipes.comparison.run_folders import clear_folder, conclude, write_failure
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import Hardware
from peft_recipes.planning.scaling import Spread
from peft_recipes.recipe.arm import Arm
from peft_recipes.runs.files import write_text
from peft_recipes.trackers.choice import LATER


class RayPool:
    """Trains each run in a process of its own on any node of the cluster, as many at a time as have room.

    A run takes the CPUs of its threads, one GPU where the cluster has any, and on a CPU the memory of its plan.
    """

    def __init__(self, address: str | None):
        self._nodes, self._stack = RayNodes(address), ExitStack()
        self._orders: dict[int, tuple[Work, Order]] = {}  # by the id of the work
        self._copies: set[Path] = set()
        self.notes: list[str] = []

    def __enter__(self) -> RayPool:
        self._stack.enter_context(self._nodes)
        self._pool = self._stack.enter_context(Pool(self._nodes))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        try:
            return self._stack.__exit__(*error)
        finally:
            for copy in self._copies:
                copy.unlink(missing_ok=True)

    def spread_of(self, arm: Arm | None, hardware: Hardware) -> Spread | None:
        return None if hardware.device == "cuda" else Spread(memory=self._nodes.memory, libraries=True)

    def submit(self, order: Order) -> None:
        clear_folder(order)
        work = self._work(order)
        self._orders[id(work)] = work, order
        self._pool.submit(work, partial(self._on_event, order, Follower(order)))

    def cancel(self, order: Order) -> None:
        for key, (work, each) in list(self._orders.items()):
            if each is order:
                self._pool.cancel(work, keep=True)
                del self._orders[key]

    def finished(self) -> Iterator[Order | None]:
        for ended in self._pool.finished():
            if ended is None:
                yield None
                continue
            work, outcome = ended
            _, order = self._orders.pop(id(work))
            if outcome.code is None:
                _conclude_lost(order, outcome)
            else:
                conclude(order, outcome.code)
            yield order

    def rest(self) -> None:
        """Nothing is kept between runs."""

    def _work(self, order: Order) -> Work:
        arm, seed = order.job
        yaml, output, data = self._fixed(order.yaml), order.output.absolute(), order.data and order.data.absolute()
        resources = self._nodes.resources(_threads(order), not order.recipe.training.get("use_cpu"))
        memory = 0 if resources["gpus"] else order.memory_bytes
        if memory > self._nodes.memory:
            raise RecipeError(
                f"Arm '{arm}' needs {memory / 1e9:.1f} GB by the plan, and no node of the cluster offers more than "
                f"{self._nodes.memory / 1e9:.1f} GB (`ray start --memory` sets it)."
            )
        return Work(
            name=f"{order.recipe.name} {arm} seed {seed}",
            module="peft_recipes.comparison.worker",
            arguments=(yaml, arm, str(seed), output, *([data] if data else [])),
            base=output,
            folder=order.folder.absolute(),
            inputs=(yaml, *([data] if data else [])),
            needed=needed_files(order.recipe, with_data=data is None),
            # A node has neither this machine's local stores of trackers nor its variables: `report_comparison` reports.
            environment={"OMP_NUM_THREADS": str(resources["cpus"]), LATER: "1"},
            memory=memory,
            **resources,
        )

    def _fixed(self, yaml: Path) -> Path:
        """A copy of the recipe that stays as it is: an arm may be added to it later, and a node is sent a file once."""
        text = yaml.read_text(encoding="utf-8")
        copy = yaml.absolute().with_name(f".recipe-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml")
        if copy not in self._copies:
            write_text(copy, text)
            self._copies.add(copy)
        return copy

    def _on_event(self, order: Order, follower: Follower, kind: str, content: Any) -> None:
        if kind == "line":
            follower.see(content)
        elif kind == "waiting":
            follower.see(b"")
        elif kind == "started":
            order.report("running")
            for package, version in content["versions"].items():
                self._note(f"Runs on another node were trained with {package} {version}, not this machine's version.")
        elif kind == "unplaced":
            order.report("running", note="waiting for a node that is free and has the CPUs, GPU and memory of a run")
        elif kind == "lost":
            arm, seed = order.job
            self._note(f"Arm '{arm}', seed {seed} was started again: {content}.")
            order.report("running", note=f"started again: {content}")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _threads(order: Order) -> int:
    import torch

    return order.recipe.threads or torch.get_num_threads()


def _conclude_lost(order: Order, outcome: Outcome) -> None:
    """Write and report the failure of a run that was lost with its node too often."""
    status = "out-of-memory" if outcome.out_of_memory else "failed"
    write_failure(order, {"schema": 1, "status": status, "error": outcome.lost})
    order.report(status, error=outcome.lost)
