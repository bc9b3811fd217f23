"""The training options of one run: what measuring needs, what the device wants, the recipe's own, then arm and seed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.distributed import processes
from peft_recipes.distributed.batches import split_batch
from peft_recipes.hardware.device import Hardware, cpu_cores
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.imports import import_module
from peft_recipes.recipe.metrics import METRICS
from peft_recipes.recipe.options import TASKS
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Of a GPU's data loader. A packed batch takes a worker a few milliseconds (benchmarks/packed_collating.py), less than
# the step of a small model takes a GPU: one worker keeps up with it, and two with images that are slow to read.
_WORKERS = 2


def run_arguments(
    recipe: Recipe, arm: Arm | None, seed: int, hardware: Hardware, folder: Path, quiet: bool, defaults: dict[str, Any]
) -> TrainingArguments:
    """The TrainingArguments of a recipe's run, of its task's class. defaults: the task's own."""
    options = {
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen, not smoothed over
        "gradient_checkpointing": False,
        "disable_tqdm": quiet,
        **hardware.training_arguments(),
        **defaults,
        **recipe.training,
        "output_dir": str(folder),
        "report_to": "none",  # training/tracking.py adds the trackers of a run
        "seed": seed,
        "data_seed": seed,
    }
    if options.get("load_best_model_at_end"):
        best = (options.get("metric_for_best_model") or "loss").removeprefix("eval_")
        # Trainer would take the highest perplexity as the best.
        options = {"greater_is_better": METRICS[best].higher_is_better} | options
        if "save_strategy" not in recipe.training:  # a best model needs a checkpoint at each evaluation
            options |= {"save_strategy": options["eval_strategy"], "save_steps": options.get("eval_steps") or 500}
    if processes.count() > 1:
        batch_size, accumulation = split_batch(recipe.training, processes.count())
        options |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    if arm is not None:
        options["learning_rate"] = arm.learning_rate
        options |= {"optim": arm.optim} if arm.optim else {}
    if any(options.get(name) for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode")):
        # Read by Accelerate: compile one layer for all layers and lengths. Recompiling the complete model for each
        # length would take longer than most runs.
        for name in ("USE_REGIONAL_COMPILATION", "USE_DYNAMIC"):
            os.environ.setdefault(f"ACCELERATE_DYNAMO_{name}", "true")
    module, _, name = TASKS[recipe.task].arguments.partition(".")
    arguments = getattr(import_module(module), name)(**options)
    if recipe.dataset.streaming:
        arguments.accelerator_config.dispatch_batches = False
    arguments.lora_plus_ratio = arm.lora_plus_ratio if arm is not None else None  # read by MethodMixin
    return arguments


def loader_options(recipe: Recipe, device: str, workers: bool) -> dict[str, Any]:
    """How a GPU's batches are loaded: collated ahead of their steps in workers, pinned, copied while the GPU computes.

    On a CPU a worker would take the cores that compute. workers: whether the task's collator may run in one; a stream
    would be read by each from its beginning.
    """
    if device != "cuda":
        return {"dataloader_pin_memory": False}
    options: dict[str, Any] = {"dataloader_pin_memory": True}
    if recipe.training.get("dataloader_pin_memory", True):
        options["accelerator_config"] = {"non_blocking": True}
    count = min(_WORKERS, max(cpu_cores() // processes.facts()["jobs"] - 1, 0))
    if workers and count and not recipe.dataset.streaming and "dataloader_num_workers" not in recipe.training:
        options |= {"dataloader_num_workers": count, "dataloader_persistent_workers": True}
        options |= {"dataloader_prefetch_factor": 2}
    return options
