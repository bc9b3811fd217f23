"""Plan a recipe: parameters, targets, checkpoint, steps and memory of every arm, from configurations alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.arms.apply import fit_targets
from peft_recipes.arms.meta import meta_checkpoint_bytes, with_arm_on_meta
from peft_recipes.arms.selection import choose_arms
from peft_recipes.distributed.batches import split_batch
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import choose
from peft_recipes.models import bases
from peft_recipes.models.architecture_table import ARCHITECTURES, head_modules
from peft_recipes.models.architectures import architecture_of
from peft_recipes.models.module_matching import matched_modules
from peft_recipes.planning import preflight
from peft_recipes.planning.memory import memory
from peft_recipes.planning.scaling import Spread
from peft_recipes.recipe.benchmarks import benchmark_name
from peft_recipes.recipe.dataset import EMBEDDED, REGRESSION
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.scoring import benchmark_tasks
from peft_recipes.scoring.answers import max_new_tokens
from peft_recipes.tasks.registry import task_of

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.tasks.base import Task


def plan(
    recipe: Recipe,
    arms: Iterable[str] | None = None,
    *,
    trial: bool = False,
    spread: Spread | None = None,
    power: float | None = None,
    output: str | Path = "adapters",
) -> dict[str, Any]:
    """Plan the arms of a recipe; return what `peft-recipes plan --json` prints.

    Needs the base's configuration, not its weights. The data is read for the number of steps, and for the class names
    where the recipe does not name them; without it steps and tokens are None, and `notes` says so. arms: as
    `choose_arms` takes them. trial: load the weights after all, and estimate the time of each arm from three steps.
    spread: over how many processes, how and with what memory each; then an arm's memory is one process's, and its
    `traffic` the bytes that each sends in a step. power: a margin in points of the metric, for which `power` says how
    many seeds and test examples a verdict takes, by pilot runs below `output`. Raises RecipeError: an unknown arm, a
    configuration that can't be loaded, a target that hits nothing, a batch that does not divide, no pilot runs.
    """
    chosen = choose_arms(recipe, arms)
    recipe, names = chosen.recipe, chosen.names
    if spread is not None:
        split_batch(recipe.training, spread.processes)
    benchmark_tasks.check(recipe.benchmarks)
    task = task_of(recipe)
    prepared, notes = _data(recipe, task)
    rows = prepared.rows if prepared else None
    config = bases.load_config(recipe, **task.base_options(prepared))
    recipe, target_notes = fit_targets(recipe, config)
    recipe, stored_notes = preflight.as_stored(recipe, config, names)
    task.recipe = recipe
    notes += [*stored_notes, *preflight.check_fit(task, prepared, config, names)]
    if {"fp16", "report_to"} & set(recipe.training):  # refused by hardware or what is installed; imports the trainer
        task.check_arguments(None, choose(recipe.training, recipe.threads))
    planned, problems, run_steps = {}, [], steps(recipe, rows)
    for name in names:
        try:
            planned[name] = _arm(task, prepared, config, name, spread)
            planned[name] |= {"steps": run_steps, "tokens": _tokens(task, prepared, run_steps)}
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    pilots = None
    if power is not None:
        from peft_recipes.planning.power import power_plan, read_pilots  # with scipy, which plans don't need

        pilots = read_pilots(recipe, names, power, Path(output))
    if trial:
        from peft_recipes.planning.trial import timed  # with transformers' Trainer, which takes seconds to import

        if prepared is None:
            raise RecipeError(f"A trial needs the data. {notes[0]}")
        for name in names:
            planned[name]["trial"] = timed(task, prepared, name, run_steps)
    note = None if config.model_type in ARCHITECTURES else architecture_of(config).note
    notes += prepared.interval_problems() if prepared else []
    answered = _answers(recipe, prepared)
    if answered:
        notes.append(
            "The base and each arm answer {prompts:,} prompts, with at most {max_new_tokens:,} new tokens each: up to "
            "{tokens:,} tokens a run.".format(**answered, tokens=answered["prompts"] * answered["max_new_tokens"])
        )
    if recipe.benchmarks:
        names_of = ", ".join(map(benchmark_name, recipe.benchmarks))
        most = f"at most {recipe.benchmark_examples:,}" if recipe.benchmark_examples else "all"
        notes.append(f"The base and each arm are evaluated on benchmarks: {names_of}, on {most} examples of each.")
    judgements = _judgements(recipe, rows, names)
    if judgements:
        notes.append(
            "The judge '{}' is asked up to {each_seed:,} questions a seed, and {base:,} once for the base.".format(
                recipe.judge.model, **judgements
            )
        )
    return {
        **({"power": power_plan(recipe, power, pilots, planned)} if pilots is not None else {}),
        "recipe": recipe.name,
        "model": recipe.model,
        "dataset": recipe.data_name,
        "embedded": recipe.uses_stand_ins,
        "rows": rows,
        "answers": answered,
        "judgements": judgements,
        "hardware": choose(recipe.training, recipe.threads).to_dict(),
        "processes": spread.processes if spread else 1,
        "distributed": spread.kind if spread else None,
        "arms": planned,
        "notes": [*notes, *target_notes, *([note] if note else []), *chosen.notes],
    }


def _arm(task: Task, prepared: Prepared | None, config: Any, name: str, spread: Spread | None) -> dict[str, Any]:
    arm = task.recipe.arms[name]
    model, parameters = with_arm_on_meta(task.recipe, config, arm, name)
    if arm.peft is not None:
        modules = matched_modules(model, model.peft_config["default"])
    else:  # the outermost trainable modules
        modules = head_modules(model) if arm.method == "head" else [name for name, _ in model.named_children()]
    return {
        "method": arm.method_name,
        "learning_rate": arm.learning_rate,
        "trainable_parameters": parameters.trainable,
        "adapter_parameters": parameters.adapter,
        "head_parameters": parameters.head,
        "total_parameters": parameters.total,
        "modules": modules,
        "checkpoint_bytes": meta_checkpoint_bytes(model, arm),
        "memory": memory(task, prepared, config, name, spread),
    }


def _answers(recipe: Recipe, prepared: Prepared | None) -> dict[str, int] | None:
    """How many prompts a run answers to be scored, and the most new tokens of an answer; None if it answers none."""
    prompts = [prompt for split in (prepared.prompts if prepared else {}).values() for prompt in split]
    return {"prompts": len(prompts), "max_new_tokens": max_new_tokens(recipe, prompts)} if prompts else None


def steps(recipe: Recipe, rows: dict[str, int] | None) -> int | None:
    """Optimizer steps of a run; None without max_steps and without the number of rows of each split."""
    training = recipe.training
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    if not rows:
        return None
    batches = math.ceil(rows["train"] / training.get("per_device_train_batch_size", 8))
    if recipe.task == "grpo":
        batches = _batches_of_answers(training, rows["train"])
    updates = max(math.ceil(batches / training.get("gradient_accumulation_steps", 1)), 1)
    return math.ceil(updates * training.get("num_train_epochs", 3))


def _batches_of_answers(training: dict[str, Any], prompts: int) -> int:
    """Batches of an epoch of GRPO, each of answers: trl leaves out the prompts that fill no generation."""
    batch, accumulation = training.get("per_device_train_batch_size", 8), training.get("gradient_accumulation_steps", 1)
    batches = training.get("steps_per_generation") or accumulation  # of one generation
    generations = prompts // max(batch * batches // training.get("num_generations", 8), 1)
    return generations * batches * training.get("num_iterations", 1)


def _tokens(task: Task, prepared: Prepared | None, steps: int | None) -> int | None:
    """Tokens that a run trains on, at the mean length of the train split; None without data and for images."""
    lengths = task.lengths(prepared, "train") if prepared else None
    if not lengths or not steps:
        return None
    training = task.recipe.training
    if training.get("max_steps", -1) > 0:
        step = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
        examples = steps * step
    else:
        examples = len(lengths) * training.get("num_train_epochs", 3)
    return round(examples * sum(lengths) / len(lengths))


def _judgements(recipe: Recipe, rows: dict[str, int] | None, arms: Collection[str]) -> dict[str, int] | None:
    """The most questions that a judge is asked for each seed, and once for the base; None without a judge.

    Every answer is compared with full's, in both orders. Equal answers are ties, and are not asked.
    """
    if recipe.judge is None:
        return None
    answers = min(recipe.test_generations, rows["test"]) if rows else recipe.test_generations
    return {"each_seed": 2 * answers * sum(arm != "full" for arm in arms), "base": 2 * answers}


def _data(recipe: Recipe, task: Task) -> tuple[Prepared | None, list[str]]:
    """The data as a run will have it; None, with a note, where it can't be loaded and the plan does not need it."""
    try:
        return task.prepare(), []
    except RecipeError as error:
        named = recipe.dataset.labels is not None or recipe.dataset.problem_type == REGRESSION
        needed = recipe.task.endswith("classification") and not named
        paths = [source.path for source in recipe.sources]
        if needed or any(path.startswith(EMBEDDED) or Path(path).exists() for path in paths):
            raise
        return None, [f"Without the data there is no number of steps: {error}"]
