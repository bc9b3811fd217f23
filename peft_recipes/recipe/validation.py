"""Every problem of a recipe, found when it is made: names, values, arms, evaluation sets, stand-ins."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from peft_recipes.errors import unknown
from peft_recipes.recipe.answer_options import answer_problems
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.benchmarks import benchmark_problems
from peft_recipes.recipe.dataset import Dataset
from peft_recipes.recipe.judge import judge_problems
from peft_recipes.recipe.mixture import mixture_problems
from peft_recipes.recipe.options import GUARDS, LANGUAGE_TASKS, TASKS, metrics_of, training_problems
from peft_recipes.recipe.streaming import streaming_problems
from peft_recipes.recipe.type_checks import type_problems

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
BATCHES = ("shared-prefix", "padded")
HUB_KERNELS = "kernels-community/"  # attention by a kernel of the Hub, for which the package kernels is needed
PACKED_ATTENTION = ("parts", "flex", "varlen", "mask")
_LEAST = {"max_length": 2, "max_row_tokens": 2, "threads": 1, "checkpoint_seconds": 0, "test_generations": 2}
# Names become file and repository names, so only characters that all of them allow.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*\Z", re.IGNORECASE)


def recipe_problems(recipe: Any) -> list[str]:
    """Return every problem of a Recipe, one line each; empty when it is valid."""
    wrong_types = type_problems(recipe)
    problems = list(wrong_types)
    if isinstance(recipe.dataset, Dataset):
        problems += recipe.dataset.problems("datasets.0" if recipe.datasets else "dataset")
        problems += mixture_problems(recipe)
    if isinstance(recipe.arms, dict):
        problems += _arm_problems(recipe)
    if isinstance(recipe.training, dict) and isinstance(recipe.task, str):
        problems += training_problems(recipe.training, recipe.task)
    if wrong_types:
        return problems  # the checks below rely on the types
    problems += [*_value_problems(recipe), *streaming_problems(recipe)]
    if recipe.pretraining is not None:
        problems += recipe.pretraining.problems()
    problems += benchmark_problems(recipe.benchmarks, recipe.benchmark_examples, recipe.task, recipe.evaluate_also)
    return problems + _evaluate_also_problems(recipe) + _embedded_problems(recipe)


def _arm_problems(recipe: Any) -> list[str]:
    problems = [] if recipe.arms else ["arms: a recipe needs at least one arm."]
    for name, arm in recipe.arms.items():
        if not _NAME.match(str(name)) or name in ("base", "all"):
            problems.append(f"arms: '{name}' can't name an arm: letters, digits, '.', '_', '-', not 'base', not 'all'.")
        if not isinstance(arm, Arm):
            problems.append(f"arms.{name}: expected an Arm (method, learning_rate), got {type(arm).__name__}.")
            continue
        problems += arm.problems(f"arms.{name}")
        if name == "full" and arm.method != "full":
            problems.append("arms.full: the other arms are compared with the arm of this name: its method is 'full'.")
        if arm.method == "head" and recipe.task in LANGUAGE_TASKS:
            problems.append(f"arms.{name}: 'head' needs a task head; a {recipe.task} model has only its LM head.")
    return problems


def _value_problems(recipe: Any) -> list[str]:
    problems = [
        f"{key}: expected text, got {getattr(recipe, key)!r}."
        for key in ("name", "task", "model")
        if not getattr(recipe, key).strip()
    ]
    if not _NAME.match(recipe.name):
        problems.append(f"name: '{recipe.name}' must be letters, digits, '.', '_' and '-' only: it names a folder.")
    metrics = metrics_of(recipe.task, recipe.dataset.problem_type)
    choices = {"task": TASKS, "metric": metrics, "batches": BATCHES, "attention": ATTENTION,
               "packed_attention": PACKED_ATTENTION}  # fmt: skip
    for key, valid in choices.items():
        if (value := getattr(recipe, key)) not in (None, *valid) and not (
            key == "attention" and str(value).startswith(HUB_KERNELS)
        ):
            problems.append(unknown(key, value, valid, f"task {recipe.task}" if key == "metric" else ""))
    if recipe.margin is not None and recipe.margin <= 0:
        problems.append(f"margin: expected a number above 0, got {recipe.margin}.")
    for key, minimum in _LEAST.items():
        if (value := getattr(recipe, key)) is not None and value < minimum:
            problems.append(f"{key}: expected {minimum} or more, got {value}.")
    problems += [*answer_problems(recipe), *judge_problems(recipe)]
    for source in recipe.sources:
        if recipe.task != "text-classification" and (source.problem_type or not isinstance(source.text, str)):
            key = "problem_type" if source.problem_type else "text"
            problems.append(f"dataset.{key}: {getattr(source, key)!r} is for text-classification, not {recipe.task}.")
    problems += [unknown("check", name, GUARDS, "skip_checks") for name in recipe.skip_checks if name not in GUARDS]
    return problems + [
        f"prompts[{i}]: expected a mapping with 'kind' and 'prompt', got {prompt!r}."
        for i, prompt in enumerate(recipe.prompts)
        if set(prompt) != {"kind", "prompt"}
    ]


def _evaluate_also_problems(recipe: Any) -> list[str]:
    keys = [f.name for f in dataclasses.fields(Dataset) if f.name != "weight"]
    problems = []
    for name, changes in recipe.evaluate_also.items():
        where = f"evaluate_also.{name}"
        if name in ("train", "validation", "test", "pretrain"):
            problems.append(f"evaluate_also: '{name}' is the name of a split of the recipe itself; choose another.")
        unknown_keys = [unknown("key", key, keys, where) for key in changes if key not in keys]
        problems += unknown_keys or Dataset(**{**vars(recipe.dataset), **changes}).problems(where)
    return problems


def _embedded_problems(recipe: Any) -> list[str]:
    """Check the keys of `embedded`; its values are checked when `--embedded` applies them."""
    names = [f.name for f in dataclasses.fields(recipe)]
    problems = [unknown("key", key, names, "embedded") for key in recipe.embedded if key not in names]
    arms = recipe.embedded.get("arms")
    if isinstance(arms, dict):
        problems += [unknown("arm", name, recipe.arms, "embedded.arms") for name in arms if name not in recipe.arms]
    return problems
