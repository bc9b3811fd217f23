"""A short run: one arm at one learning rate, trained on the train split and evaluated on the validation split.

Nothing is saved. The caller sets `task.reads_test = False` before preparing the data, so the test split is not loaded.
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
from peft_recipes.hardware.device import Hardware, release_memory
from peft_recipes.measuring.steps import StepMeter
from peft_recipes.recipe.arm import Arm

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task


@dataclass
class ShortRun:
    """The result of a short run: its validation metrics at each evaluation and how it ended.

    ended: "whole" (all steps), "stopped" (by halving), "out of time" or "diverged". seconds: "load", one "step", one
    "evaluate", "first_pass" (a linear probe caching its features), "total".
    """

    learning_rate: float
    validation: list[dict[str, float]] = field(default_factory=list)
    ended: str = "whole"
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The latest validation loss."""
        return self.validation[-1]["loss"] if self.validation else None


@dataclass
class _Evaluations(TrainerCallback):
    """Evaluates the validation split after the given steps; ends training early on halving or at the deadline."""

    steps: Sequence[int]
    evaluate: Callable[[], dict[str, float]]
    keep_training: Callable[[ShortRun], bool]
    run: ShortRun
    deadline: float
    seconds: list[float] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            start = time.perf_counter()
            self.run.validation.append({"step": state.global_step, **self.evaluate()})
            self.seconds.append(time.perf_counter() - start)
            if state.global_step < state.max_steps and not self.keep_training(self.run):
                self.run.ended, control.should_training_stop = "stopped", True
        if state.global_step < state.max_steps and time.monotonic() > self.deadline and self.run.ended == "whole":
            self.run.ended, control.should_training_stop = "out of time", True


def short_run(
    task: Task,
    prepared: Prepared,
    arm: Arm,
    name: str,
    steps: int,
    evaluate_after: Sequence[int],
    hardware: Hardware,
    *,
    seed: int = 0,
    keep_training: Callable[[ShortRun], bool] = lambda run: True,
    deadline: float = float("inf"),
) -> ShortRun:
    """Train an arm for `steps` optimiser steps in this process, with a schedule of that length.

    evaluate_after: the steps after which the validation split is evaluated. keep_training: called after each evaluation
    but the last. deadline: on the clock of time.monotonic(); no step starts after it. A loss that is not finite ends
    the run as "diverged"; other errors are raised.
    """
    run, start = ShortRun(arm.learning_rate), time.perf_counter()
    with _freed_memory(hardware.device), tempfile.TemporaryDirectory(prefix="scan-") as folder:
        set_seed(seed)
        base, new = task.load_base(prepared, arm.quantise) if arm.quantise else task.load_base(prepared)
        task.use_base(base, prepared, arm.quantise)
        model, _ = apply_arm(base, arm, task.recipe.task, new, name, skip_checks=task.recipe.skip_checks)
        arguments = task.arguments(arm, seed, hardware, Path(folder), True)
        arguments.max_steps, arguments.eval_strategy = steps, "no"
        meter = StepMeter(hardware.device)

        def evaluate() -> dict[str, float]:
            return task.evaluate(trainer, prepared, "validation").metrics

        evaluations = _Evaluations(evaluate_after, evaluate, keep_training, run, deadline)
        trainer = task.trainer(model, prepared, arguments, [meter, evaluations])
        trainer.remove_callback(PrinterCallback)
        run.seconds["load"] = time.perf_counter() - start
        try:
            trainer.train()
        except FloatingPointError as error:
            run.ended, run.error = "diverged", str(error)
        measured = meter.steps[1:] or meter.steps  # the first step warms up
        first_pass = getattr(trainer, "pass_figures", None) or {"seconds": 0.0}
        run.seconds |= {
            "step": _mean(measured),
            "evaluate": _mean(evaluations.seconds),
            "first_pass": first_pass["seconds"],
            "total": time.perf_counter() - start,
        }
    return run


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@contextlib.contextmanager
def _freed_memory(device: str) -> Iterator[None]:
    """Free the model and its optimizer at the end: they refer to each other, and the next run needs the memory."""
    try:
        yield
    finally:
        gc.collect()
        release_memory(device)
