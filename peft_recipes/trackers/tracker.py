"""`Tracker`: what a run needs of an experiment tracker, and how its run there is named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"


@dataclass(frozen=True)
class Identity:
    """The names of a run in a tracker.

    project: training.project of the recipe, else the recipe's name. group: of one comparison: training.run_name, else
    the recipe's name. A variable of the environment that names either wins.
    """

    arm: str
    seed: int
    project: str
    group: str

    def name_in(self, project: str) -> str:
        """The name of the run: `ARM-seed-N`, after the group where the project holds other groups, too."""
        own = f"{self.arm}-seed-{self.seed}"
        return own if project == self.group else f"{self.group}/{own}"


class Tracker(ABC):
    """One tracker's run of one run of a recipe. Every method may raise whatever the tracker's client raises.

    folder: of the run. seen: the last step that an earlier process reported, by the metric's name in Trainer's logs.
    """

    name = ""
    events: TrainerCallback  # the callback that gets Trainer's events, set once it is open

    def __init__(self, identity: Identity, folder: Path):
        self.identity, self.folder = identity, folder
        self.seen: dict[str, int] = {}

    @abstractmethod
    def open(self, config: dict[str, Any], place: dict[str, Any] | None, step: int | None) -> dict[str, Any]:
        """Start the tracker's run, or continue the one at `place`; return its place: id, url and what finds it again.

        step: of the checkpoint that training resumes from; 0 for training from the start; None to add to a run whose
        training has ended.
        """

    @abstractmethod
    def callback(self) -> TrainerCallback:
        """transformers' callback for this tracker; only its on_log and on_save are called."""

    def event(self, name: str, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Pass an event of Trainer on to the callback; what an earlier process has logged is left out."""
        if name == "on_log":
            logs = more.pop("logs", None) or {}
            new = {key: value for key, value in logs.items() if state.global_step > self.seen.get(key, -1)}
            if new:
                self.events.on_log(args, state, control, logs=new, **more)
        elif name == "on_save":
            self.events.on_save(args, state, control, **more)

    @abstractmethod
    def add(self, metrics: dict[str, float], texts: dict[str, str], files: Sequence[Path], step: int) -> None:
        """Add final figures, short texts and files to the run. step: the last of the training."""

    @abstractmethod
    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED. Called once after `open`, whatever happened in between."""
