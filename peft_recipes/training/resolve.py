"""Turn a recipe into what a run needs, before any weight is loaded: data, targets, schedules, precision and memory.

`resolve` settles everything but memory, once for all arms; `memory_estimates` and `fit_memory` compare the arms with
the memory of the machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.arms.apply import fit_targets
from peft_recipes.data import cache
from peft_recipes.distributed import processes
from peft_recipes.embedded.cache import say
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import Hardware, choose
from peft_recipes.models import bases
from peft_recipes.models.chat_templates import template_text
from peft_recipes.planning import memory as planned
from peft_recipes.planning import preflight
from peft_recipes.planning.plan import steps
from peft_recipes.planning.scaling import Spread
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.mixture import dataset_changes
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import read_yaml
from peft_recipes.scoring import benchmark_tasks
from peft_recipes.training import kept

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task


@dataclass
class Resolved:
    """A recipe as it will run: its targets fit its base, its schedules fit its steps, its precision is fixed.

    task: holds the resolved recipe. prepared: its data, with notes on what was changed. config: of its base.
    """

    task: Task
    prepared: Prepared
    config: PretrainedConfig
    hardware: Hardware

    @property
    def fingerprint(self) -> str:
        """Changes with the data, and with what the benchmarks ask."""
        return self.prepared.fingerprint + benchmark_tasks.fingerprint(self.recipe.benchmarks)

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe


def resolve(
    recipe: Recipe, arms: Collection[str], *, earlier: Path | None = None, data: Path | None = None
) -> Resolved:
    """Settle data, targets, schedules and precision of a recipe for some of its arms.

    earlier: the folder of an earlier call, whose precision is kept. data: the folder with the data that a comparison
    prepared for all its runs; None prepares it here. Raises RecipeError for what is wrong with any of them.
    """
    from peft_recipes.tasks.method_mixin import fit_schedules
    from peft_recipes.tasks.registry import task_of

    recipe = _with_template_text(with_precision(recipe, earlier))
    hardware = choose(recipe.training, recipe.threads)
    task = task_of(recipe)
    if recipe.benchmarks and not data:  # a comparison has done so; the libraries cache what it has downloaded
        benchmark_tasks.load(recipe.benchmarks)
    prepared = kept.prepared(task, data, lambda: cache.read(data, recipe) if data else task.prepare())
    if found := task.found(prepared):
        recipe = task.recipe = recipe.with_changes(found)
    config = bases.load_config(recipe, **task.base_options(prepared))
    recipe, target_notes = fit_targets(recipe, config)
    recipe, notes = preflight.as_stored(recipe, config, arms)
    task.recipe, schedule_notes = fit_schedules(recipe, steps(recipe, prepared.rows))
    task.recipe = _with_order(task, config)
    notes += preflight.check_fit(task, prepared, config, arms)
    prepared.notes += [note for note in notes if note not in prepared.notes]
    prepared.notes += [note for note in (*target_notes, *schedule_notes) if any(f"'{arm}'" in note for arm in arms)]
    return Resolved(task, prepared, config, hardware)


def _with_template_text(recipe: Recipe) -> Recipe:
    """The recipe with the text of its chat template instead of a file's path, so that recipe.yaml needs no file."""
    choice = recipe.dataset.chat_template
    if choice is None or (text := template_text(choice)) == choice:
        return recipe
    return recipe.with_changes(dataset_changes(recipe, {"chat_template": text}))


def report_notes(prepared: Prepared) -> None:
    """Log what was made of the data (columns not used, rows left out, ...) to stderr, before anything is trained."""
    for note in prepared.notes:
        say(f"Note: {note}")


def memory_estimates(
    resolved: Resolved, arms: Collection[str], spread_of: Callable[[Arm], Spread | None]
) -> dict[str, dict[str, Any]]:
    """Estimate the memory of each arm. Raises RecipeError with every arm that does not fit or has a refused option.

    spread_of: over how many processes a run of the arm is spread.
    """
    recipe, task, hardware = resolved.recipe, resolved.task, resolved.hardware
    task.check_arguments(None, hardware)
    problems, estimates = [], {}
    for name in arms:
        arm = recipe.arms[name]
        try:
            task.check_arguments(arm, hardware)
            estimates[name] = planned.memory(task, resolved.prepared, resolved.config, name, spread_of(arm))
        except RecipeError as error:
            problems += error.problems
            continue
        if not estimates[name]["fits"] and "memory" not in recipe.skip_checks:
            problems.append(planned.too_large(name, estimates[name], recipe))
    if problems:
        raise RecipeError(*problems)
    return estimates


def fit_memory(resolved: Resolved, name: str) -> Recipe:
    """Return the recipe of one run, with gradient checkpointing on where a step only fits with it, and add a note.

    Raises RecipeError for an arm that does not fit at all.
    """
    recipe, task, arm = resolved.recipe, resolved.task, resolved.recipe.arms.get(name)
    if arm is None or planned.surely_fits(task, resolved.config):
        return recipe
    # On a CPU all processes of a machine share its memory. Runs at a time are planned together (planning/together.py).
    on_one = processes.local_count() if resolved.hardware.device == "cpu" else 1
    spread = Spread(processes.distributed_type(), processes.count(), on_one=on_one)
    estimate = planned.memory(task, resolved.prepared, resolved.config, name, spread)
    if not estimate["fits"]:
        raise RecipeError(planned.too_large(name, estimate, recipe))
    if estimate["gradient_checkpointing"] and "gradient_checkpointing" not in recipe.training:
        resolved.prepared.notes.append(
            f"arm '{name}': gradient checkpointing is on; without it a step would not fit this machine's memory."
        )
        return recipe.with_changes({"training": {"gradient_checkpointing": True}})
    return recipe


def _with_order(task: Task, config: PretrainedConfig) -> Recipe:
    """Return the task's recipe with the order of its examples settled, once for all arms."""
    if task.recipe.dataset.streaming:  # a stream has its own order
        return task.recipe
    if "train_sampling_strategy" in task.recipe.training or (order := task.example_order(config)) is None:
        return task.recipe
    return task.recipe.with_changes({"training": {"train_sampling_strategy": order}})


def with_precision(recipe: Recipe, folder: Path | None) -> Recipe:
    """Return the recipe with its precision settled: that of an earlier call in `folder`, else by a trial here.

    Near the trial's threshold two processes might choose differently, and a resumed run would not continue the same.
    """
    names = ("bf16", "fp16")
    settled = {name: recipe.training[name] for name in names if recipe.training.get(name) is not None}
    if not settled and folder is not None and (folder / "recipe.yaml").is_file():
        with contextlib.suppress(RecipeError, AttributeError, OSError):
            earlier = read_yaml(folder / "recipe.yaml").get("training") or {}
            settled = {name: earlier[name] for name in names if isinstance(earlier.get(name), bool)}
    precision = choose(recipe.training | settled, recipe.threads).precision
    chosen = {"bf16": precision == "bf16", **({"fp16": True} if precision == "fp16" else {})}
    return recipe.with_changes({"training": chosen | settled})
