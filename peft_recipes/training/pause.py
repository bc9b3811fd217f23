"""Where a run pauses before its end, and whether the run of a folder has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft_recipes.runs import checkpoints
from peft_recipes.runs.folder import Run
from peft_recipes.runs.progress import PAUSED, read_progress


@dataclass
class Pause:
    """The step after which a run pauses, if any, and whether it has.

    possible: whether the run writes checkpoints. One that does not (AdaLoRA, a linear probe on cached features) would
    start again after a pause, so it goes on to its end instead.
    """

    at: int | None = None
    reached: bool = False
    possible: Callable[[], bool] = lambda: True

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the run pauses after this step of its `steps`."""
        return self.at is not None and self.at <= step < steps and self.possible()


def paused_run(folder: Path, signature: str, step: int) -> Run | None:
    """The run of a folder if it is paused at this step or further on, with the checkpoint to continue from."""
    progress = read_progress(folder, signature)
    if progress is None or progress["step"] < step:
        return None
    checkpoint, _ = checkpoints.newest(folder / checkpoints.FOLDER, signature)
    return Run(folder, {"status": PAUSED, **progress}) if checkpoint and checkpoint.step >= step else None
