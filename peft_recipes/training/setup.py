"""The arguments of one run, and the state that its stages share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.guards.runner import Guards
from peft_recipes.measuring.steps import Stopwatch
from peft_recipes.recipe.arm import Arm
from peft_recipes.trackers.session import Session
from peft_recipes.training.interruption import Interruption
from peft_recipes.training.pause import Pause
from peft_recipes.training.resolve import Resolved

if TYPE_CHECKING:
    from peft_recipes.training.shared_base import Member


@dataclass(frozen=True)
class RunArguments:
    """The arguments of one call of `train`.

    data: the folder with the data that a comparison prepared, if any. pause_at: the step after which the run pauses.
    shared: where the run shares its base with others of this process.
    """

    arm: str
    seed: int
    folder: Path
    resume: bool
    wait: bool
    quiet: bool
    data: Path | None
    overwrite: bool = False
    pause_at: int | None = None
    shared: Member | None = None


@dataclass(kw_only=True)
class Setup(Resolved):
    """What the stages of one run share: its resolved recipe, and the state of the run.

    signature: of recipe, arm, seed, data and code; a checkpoint of another signature is not resumed. attention: the
    attention implementation of the loaded base. session: the open trackers, on rank 0 of a run that reports to some.
    pause: where this call ends before the run does. warm: whether a process that may have trained other runs trained a
    part of this one. earlier_notes: of the chunks before.
    """

    run: RunArguments
    signature: str
    interruption: Interruption
    guard: Guards
    watch: Stopwatch
    attention: str | None = None
    session: Session | None = None
    pause: Pause = field(default_factory=Pause)
    warm: bool = False
    earlier_notes: list[str] = field(default_factory=list)

    @property
    def arm(self) -> Arm | None:
        """The arm to train; None for the untrained base, which is evaluated only."""
        return self.recipe.arms.get(self.run.arm)

    @property
    def quantise(self) -> str | None:
        return self.arm.quantise if self.arm else None
