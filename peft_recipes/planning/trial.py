"""A plan's trial: a few real steps of an arm, from which the time of a run is estimated."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from peft_recipes.arms.apply import apply_arm
from peft_recipes.hardware.device import choose
from peft_recipes.measuring.steps import StepMeter
from peft_recipes.scoring.answers import max_new_tokens
from peft_recipes.scoring.generation import BATCH_SIZE, generate

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.recipe.recipe import Recipe
    from peft_recipes.tasks.base import Task

_TIMED_TOKENS = 8  # of each answer
_STEPS = 3  # one to warm up, two to time


def timed(task: Task, prepared: Prepared, name: str, steps: int | None) -> dict[str, float | None]:
    """Train an arm for three steps, on the recipe's own model and data; nothing is kept.

    Returns seconds_per_step (of the last two), tokens_per_second (None for images), estimated_seconds of all `steps` at
    that pace: training alone, like `training_seconds`, without evaluation; and the most answer_seconds that scored
    answers take, at the pace of one batch of them (None for tasks without).
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
        "answer_seconds": _answer_seconds(model, recipe, prepared),
    }


def _answer_seconds(model: nn.Module, recipe: Recipe, prepared: Prepared) -> float | None:
    """The time of all scored answers if each is as long as it may be, at the pace of a few tokens of one batch."""
    prompts = [prompt for split in prepared.prompts.values() for prompt in split]
    if not prompts:
        return None
    batch, pad = [prompt["prompt_ids"] for prompt in prompts[:BATCH_SIZE]], prepared.processor.pad_token_id
    start = time.perf_counter()
    generate(model, batch, pad, _TIMED_TOKENS, {"min_new_tokens": _TIMED_TOKENS})
    per_token = (time.perf_counter() - start) / (_TIMED_TOKENS * len(batch))
    return per_token * len(prompts) * max_new_tokens(recipe, prompts)
