"""A plan's trial: a few real steps of each arm, from which the time of the whole run is told."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.hardware.device import choose
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task

_STEPS = 3  # one to warm up, two to time


def timed(recipe: Recipe, task: Task, prepared: Prepared, name: str, steps: int | None) -> dict[str, float | None]:
    """Three steps of an arm, here, on the recipe's own model and data; nothing is kept.

    Returns seconds_per_step (of the last two), tokens_per_second (None for images), and estimated_seconds, all steps
    at that pace: training alone, as `training_seconds` has it, without evaluation.
    """
    import transformers

    from peft_recipes.arms.apply import apply_arm
    from peft_recipes.measuring.steps import StepMeter

    hardware = choose(recipe.training, recipe.threads)
    arm = recipe.arms[name]
    transformers.set_seed(0)
    prepared = task.for_trial(prepared, _STEPS)
    base, new = task.load_base(prepared, arm.quantise)
    model, _ = apply_arm(base, arm, recipe.task, new, name)
    meter = StepMeter(hardware.device)
    with tempfile.TemporaryDirectory(prefix="trial-") as folder:
        arguments = task.arguments(arm, 0, hardware, Path(folder), True)
        arguments.max_steps, arguments.eval_strategy = _STEPS, "no"
        trainer = task.trainer(model, prepared, arguments, [meter])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    step = statistics.fmean(meter.steps[1:])
    tokens = sum(int(counts.tokens) for counts in trainer.step_counts()[1:])
    first = (getattr(trainer, "pass_figures", None) or {"seconds": 0.0})["seconds"]
    return {
        "seconds_per_step": step,
        "tokens_per_second": tokens / sum(meter.steps[1:]) if tokens else None,
        "estimated_seconds": first + step * steps if steps else None,
    }
