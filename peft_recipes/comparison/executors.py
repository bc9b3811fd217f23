"""`Executor`: where the runs of a comparison are trained. The comparison knows this interface alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from peft_recipes.comparison.orders import Order
from peft_recipes.comparison.places import LOCAL, check_place
from peft_recipes.comparison.pool import LocalPool
from peft_recipes.distributed.jobs import Jobs, check_jobs
from peft_recipes.distributed.launch import Launch
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import Hardware
from peft_recipes.planning.scaling import Spread
from peft_recipes.recipe.arm import Arm


class Executor(Protocol):
    """Trains runs, each in a process of its own. Used in a `with` block.

    Where the block is left by an error or an interruption, the runs in progress write a checkpoint and end. notes: what
    a reader of the comparison should know of where its runs were trained.
    """

    notes: list[str]

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...

    def spread_of(self, arm: Arm | None, hardware: Hardware) -> Spread | None:
        """How a run of an arm shares a machine's memory, for its estimate; None: it has this machine's to itself."""

    def submit(self, order: Order) -> None:
        """Add a run; it starts as soon as there is room for it."""

    def finished(self) -> Iterator[Order | None]:
        """Yield each run as it ends, well or not, with its run.json written, until none is left.

        None is yielded while nothing has ended, a few times a second. More may be submitted or cancelled between two
        of them. Raises RecipeError where no run can be trained.
        """

    def rest(self) -> None:
        """End what was kept between runs that took turns: none of them goes on."""

    def cancel(self, order: Order) -> None:
        """Drop a run that has not ended; it is not yielded. Its checkpoints are kept."""


def executor_of(
    on: str = LOCAL, address: str | None = None, *, jobs: Jobs = 1, launch: Launch | None = None
) -> Executor:
    """Return the executor with a name: "local", `jobs` runs at a time, or "ray". Raises RecipeError for a bad argument.

    jobs: "auto" for as many as fit (planning/together.py). address: of the Ray cluster. launch: of each run, on this
    machine alone.
    """
    check_place(on, address)
    if on == LOCAL:
        return LocalPool(check_jobs(jobs), launch)
    if launch is not None:
        raise RecipeError(
            "--on ray trains each run on one node: leave out --launch. One run over several nodes is Accelerate's: "
            "`accelerate launch` on each of them."
        )
    if jobs != 1:
        raise RecipeError("--jobs counts the runs on this machine; with --on ray as many run at a time as the nodes "
                          "have CPUs, GPUs and memory for: leave it out.")  # fmt: skip
    from peft_recipes.comparison.on_ray import RayPool

    return RayPool(address)
