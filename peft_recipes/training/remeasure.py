"""Time a few steps of a finished run again, with its latency; nothing of the run is changed here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from peft_recipes.arms.apply import apply_arm
from peft_recipes.arms.merge import merged
from peft_recipes.distributed import processes
from peft_recipes.hardware.environment import environment
from peft_recipes.kernels import allocator
from peft_recipes.measuring.latency import median_milliseconds
from peft_recipes.measuring.steps import WARMUP_STEPS, StepMeter
from peft_recipes.models.quantisation import dequantised
from peft_recipes.runs.folder import resolved_recipe
from peft_recipes.training.resolve import resolve
from peft_recipes.training.save import restore
from peft_recipes.training.verify import TIMED_INPUTS, compute_logits

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import Trainer

    from peft_recipes.training.resolve import Resolved


class _StopAfter(transformers.TrainerCallback):
    """End training after some steps, with the schedules of the complete run."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def remeasure(folder: Path, arm: str, seed: int, *, steps: int, data: Path | None = None) -> dict[str, Any]:
    """Train the first `steps` steps after the warm-up of a run again, and time its saved checkpoint.

    folder: the run's. Returns figures (as `training` of run.json), step_seconds (without the warm-up), latency_ms,
    generation_tokens_per_second and environment.
    """
    allocator.set_for_training()
    resolved = resolve(resolved_recipe(folder / "recipe.yaml"), [arm], data=data)
    figures, timed = _steps(resolved, arm, seed, WARMUP_STEPS + steps)
    return {
        "training": figures,
        "step_seconds": timed,
        **_latencies(resolved, arm, folder),
        "environment": {**environment(resolved.hardware), **processes.facts()},
    }


def _steps(resolved: Resolved, name: str, seed: int, steps: int) -> tuple[dict[str, Any], list[float]]:
    task, recipe = resolved.task, resolved.recipe
    arm = recipe.arms[name]
    transformers.set_seed(seed)
    base, new_weights = task.load_base(resolved.prepared, arm.quantise)
    task.use_base(base, resolved.prepared, arm.quantise)
    model, _ = apply_arm(base, arm, recipe.task, new_weights, name, skip_checks=recipe.skip_checks)
    meter = StepMeter(resolved.hardware.device)
    with tempfile.TemporaryDirectory(prefix="measure-") as folder:
        arguments = task.arguments(arm, seed, resolved.hardware, Path(folder), True)
        arguments.eval_strategy, arguments.save_strategy, arguments.load_best_model_at_end = "no", "no", False
        trainer: Trainer = task.trainer(model, resolved.prepared, arguments, [meter, _StopAfter(steps)])
        trainer.on_data = meter.add_data_seconds
        trainer.recipe_batch_size = recipe.training.get("per_device_train_batch_size", 8)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    figures = meter.figures(trainer.step_counts(), trainer.pass_figures, [trainer.own_tokens()])
    return figures, meter.steps[figures["warmup_steps"] :]


def _latencies(resolved: Resolved, name: str, folder: Path) -> dict[str, Any]:
    """Latency and generation speed of the base, with the saved adapter, and merged, as after training."""
    task, recipe, hardware = resolved.task, resolved.recipe, resolved.hardware
    arm, inputs = recipe.arms[name], task.inputs(resolved.prepared, TIMED_INPUTS)
    latencies: dict[str, float | None] = {"base": None, "adapter": None, "merged": None}
    speeds: dict[str, float | None] = dict(latencies)

    def load() -> tuple[nn.Module, list[str]]:
        base, new_weights = task.load_base(resolved.prepared, arm.quantise)
        return base.to(hardware.device).eval(), new_weights

    def measure(variant: str, model: nn.Module) -> None:
        model.eval()
        latencies[variant] = median_milliseconds(
            lambda batch: compute_logits(model, [batch], hardware, exact=False), inputs, hardware.device
        )
        speeds[variant] = task.generation_speed(model, resolved.prepared)

    base, new_weights = load()
    if arm.peft is not None:
        measure("base", base)
    model = restore(base, new_weights, arm, recipe, folder).to(hardware.device)
    measure("base" if arm.peft is None else "adapter", model)
    if arm.peft is not None:
        if arm.quantise:
            base, new_weights = load()
            model = restore(dequantised(base), new_weights, arm, recipe, folder).to(hardware.device)
        if (merged_model := merged(model)) is not None:
            measure("merged", merged_model)
    generates = any(speed is not None for speed in speeds.values())
    return {"latency_ms": latencies, "generation_tokens_per_second": speeds if generates else None}
