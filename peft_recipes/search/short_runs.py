"""A short run of one arm at one rate: on the train split, judged on the validation split, nothing kept.

The test split is not here at all: the task is told to leave it unread before its data is prepared.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from peft_recipes.arms.apply import apply_arm
from peft_recipes.hardware.device import Hardware
from peft_recipes.measuring.steps import StepMeter
from peft_recipes.recipe.arm import Arm

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task


@dataclass
class ShortRun:
    """What came of one: figures of the validation split at each of its marks, and how it ended.

    ended: "whole", "stopped" (by its judge), "out of time" or "diverged". seconds: "load", "step" (one), "evaluate"
    (once), "total".
    """

    learning_rate: float
    validation: list[dict[str, float]] = field(default_factory=list)
    ended: str = "whole"
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The validation loss at its last mark."""
        return self.validation[-1]["loss"] if self.validation else None


class _Marks(TrainerCallback):
    """Evaluates the validation split after some of the steps; ends the training where the judge or the clock says."""

    def __init__(
        self, marks: Sequence[int], evaluate: Callable[[], dict[str, float]], judge: Callable[[ShortRun], bool],
        made: ShortRun, deadline: float,
    ):  # fmt: skip
        self.marks, self.evaluate, self.judge, self.made, self.deadline = marks, evaluate, judge, made, deadline
        self.spent: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.marks:
            start = time.perf_counter()
            self.made.validation.append({"step": state.global_step, **self.evaluate()})
            self.spent.append(time.perf_counter() - start)
            if state.global_step < state.max_steps and not self.judge(self.made):
                self.made.ended, control.should_training_stop = "stopped", True
        if state.global_step < state.max_steps and time.monotonic() > self.deadline and self.made.ended == "whole":
            self.made.ended, control.should_training_stop = "out of time", True


def short_run(
    task: Task,
    prepared: Prepared,
    arm: Arm,
    name: str,
    steps: int,
    marks: Sequence[int],
    hardware: Hardware,
    *,
    seed: int = 0,
    judge: Callable[[ShortRun], bool] = lambda made: True,
    deadline: float = float("inf"),
) -> ShortRun:
    """Trains an arm for `steps` optimiser steps, here, its schedule as long as that.

    marks: steps after which the validation split is evaluated. judge: asked after each mark but the last whether to go
    on. deadline: of time.monotonic(), after which no further step is begun. A loss that is not finite ends it as
    "diverged"; what else stops it is raised.
    """
    made, start = ShortRun(arm.learning_rate), time.perf_counter()
    with _memory_given_back(), tempfile.TemporaryDirectory(prefix="scan-") as folder:
        set_seed(seed)
        base, new = task.load_base(prepared, arm.quantise) if arm.quantise else task.load_base(prepared)
        model, _ = apply_arm(base, arm, task.recipe.task, new, name, skip_checks=task.recipe.skip_checks)
        arguments = task.arguments(arm, seed, hardware, Path(folder), True)
        arguments.max_steps, arguments.eval_strategy = steps, "no"
        meter = StepMeter(hardware.device)
        marked = _Marks(marks, lambda: task.evaluate(trainer, prepared, "validation").metrics, judge, made, deadline)
        trainer = task.trainer(model, prepared, arguments, [meter, marked])
        trainer.remove_callback(PrinterCallback)
        made.seconds["load"] = time.perf_counter() - start
        try:
            trainer.train()
        except FloatingPointError as error:
            made.ended, made.error = "diverged", str(error)
        made.seconds |= _seconds(meter, marked, trainer)
        made.seconds["total"] = time.perf_counter() - start
    return made


def _seconds(meter: StepMeter, marked: _Marks, trainer: Any) -> dict[str, float]:
    """The mean step (the first, which warms up, apart where there are others), the mean evaluation, the first pass."""
    steps = meter.steps[1:] or meter.steps
    first = getattr(trainer, "pass_figures", None) or {"seconds": 0.0}
    return {
        "step": sum(steps) / len(steps) if steps else 0.0,
        "evaluate": sum(marked.spent) / len(marked.spent) if marked.spent else 0.0,
        "first_pass": first["seconds"],
    }


@contextlib.contextmanager
def _memory_given_back() -> Iterator[None]:
    """A model and its optimizer hold on to each other; the next run needs their room."""
    import torch

    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
