"""A plan's trial: a few real steps of an arm, from which the time of a run is estimated."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from peft_recipes.arms.apply import apply_arm
from peft_recipes.hardware.device import choose
from peft_recipes.measuring.steps import StepMeter

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task

_STEPS = 3  # one to warm up, two to time


def timed(task: Task, prepared: Prepared, name: str, steps: int | None) -> dict[str, float | None]:
    """Train an arm for three steps, on the recipe's own model and data; nothing is kept.

    Returns seconds_per_step (of the last two), tokens_per_second (None for images), and estimated_seconds of all
    `steps` at that pace: training alone, like `training_seconds`, without evaluation.
    """
    recipe, arm = task.recipe, task.recipe.arms[name]
    hardware = choose(recipe.training, recipe.threads)
    transformers.set_seed(0)
    prepared = task.for_trial(prepared, _STEPS)
    base, new_weights = task.load_base(prepared, arm.quantise)
    task.use_base(base, prepared, arm.quantise)
    model, _ = apply_arm(base, arm, recipe.task, new_weights, name)
    meter = StepMeter(hardware.device)
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        arguments = task.arguments(arm, 0, hardware, Path(folder), True)
        arguments.max_steps, arguments.eval_strategy = _STEPS, "no"
        trainer = task.trainer(model, prepared, arguments, [meter])
        trainer.on_data = meter.add_data_seconds
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    timed_steps = meter.steps[1:]
    tokens = sum(int(counts.tokens) for counts in trainer.step_counts()[1:])
    step, before = statistics.fmean(timed_steps), trainer.pass_figures["seconds"] if trainer.pass_figures else 0.0
    return {
        "seconds_per_step": step,
        "tokens_per_second": tokens / sum(timed_steps) if tokens else None,
        "estimated_seconds": before + step * steps if steps else None,
    }
