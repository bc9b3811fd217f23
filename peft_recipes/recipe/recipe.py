"""Recipe and Arm: one fine-tuning problem as pure data, checked when made, to YAML and back without loss."""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import EMBEDDED, Dataset, Pretraining
from peft_recipes.recipe.options import GUARDS, LANGUAGE_TASKS, TASKS, training_problems
from peft_recipes.recipe.serialization import (
    key_problems,
    merge,
    part,
    read_yaml,
    to_yaml,
)
from peft_recipes.recipe.type_checks import type_problems

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
BATCHES = ("shared-prefix", "padded")
# Written into every file name and repository name, so kept to what all of them take.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*\Z", re.IGNORECASE)


@dataclass
class Recipe:
    """One fine-tuning problem as pure data.

    name: also the folder of its runs. task: one of `TASKS`. model: a Hub id, a folder, "embedded:NAME" or "small-cnn".
    dataset: see `Dataset`. arms: name -> Arm. training: any TrainingArguments (of language tasks SFTConfig, DPOConfig)
    option.
    max_length: tokens an example may have. batches: of causal models, "shared-prefix" (exact, see data/packing.py) or
    "padded". max_row_tokens: how long a shared row may be. metric: what arms are compared by, "accuracy" or "loss"
    (of preferences "preference_accuracy" or "loss").
    margin: how near is equivalent, absolute (default: 0.01 of accuracy, 1 % of the full arm's loss).
    evaluate_also: further evaluation sets, to see what tuning made the model forget: name -> what differs from
    `dataset` ({"clean": {"transform": None}}, or another `path`, of which the test split is taken: plain text, say).
    prompts: for causal models, answered by the base and every arm: [{"kind": ..., "prompt": ...}].
    attention: how attention is computed ("sdpa", "eager", "flash_attention_2"; None: the library's choice). threads: of
    the CPU (None: torch's choice, or OMP_NUM_THREADS). skip_checks: names of guards that are not to be heeded.
    checkpoint_seconds: how often a run under way stores what it needs to go on after it was killed (0: every step).
    embedded: what `--embedded` changes, in the shape of the recipe itself ({"model": ..., "dataset": {...}, ...}).

    Raises RecipeError that holds *every* problem found.
    """

    name: str
    task: str
    model: str
    dataset: Dataset
    arms: dict[str, Arm]
    title: str = ""
    description: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    max_length: int = 256
    batches: str = "shared-prefix"
    max_row_tokens: int = 4_096
    metric: str | None = None
    margin: float | None = None
    evaluate_also: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretraining: Pretraining | None = None
    prompts: list[dict[str, str]] = field(default_factory=list)
    trust_remote_code: bool = False
    attention: str | None = None
    threads: int | None = None
    skip_checks: list[str] = field(default_factory=list)
    checkpoint_seconds: float = 300.0
    embedded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric is None:
            self.metric = TASKS[self.task].metrics[0] if self.task in TASKS else "accuracy"
        problems = self.problems()
        if problems:
            raise RecipeError(*problems)

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "loss"

    @property
    def uses_stand_ins(self) -> bool:
        """Whether model or data is an embedded stand-in, which must then be said wherever figures are shown."""
        return self.model.startswith(EMBEDDED) or self.dataset.path.startswith(EMBEDDED)

    def problems(self) -> list[str]:
        """Every problem of this recipe, one line each; empty when it is sound."""

        return _recipe_problems(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML takes it; `from_dict` gives an equal recipe back."""
        made: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "arms":
                value = {name: arm.to_dict() for name, arm in value.items()}
            elif dataclasses.is_dataclass(value):
                value = dataclasses.asdict(value)
            made[f.name] = copy.deepcopy(value)
        return made

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Recipe:
        """A recipe from plain data. Raises RecipeError with every unknown key, missing key and wrong value."""
        if not isinstance(given, dict):
            raise RecipeError(f"A recipe is a mapping of names to values, got {type(given).__name__}.")
        problems = key_problems(given, cls, "the recipe")
        names = [f.name for f in dataclasses.fields(cls)]
        parts = {key: value for key, value in given.items() if key in names}
        for key, kind in (("dataset", Dataset), ("pretraining", Pretraining)):
            if parts.get(key) is not None:
                parts[key], more = part(parts[key], kind, key)
                problems += more
        parts["arms"], more = _arms(given.get("arms"))
        problems += more
        for key, kind in (("training", dict), ("evaluate_also", dict), ("embedded", dict)):
            if key in parts and not isinstance(parts[key], kind):
                problems.append(f"{key}: expected a mapping, got {type(parts.pop(key)).__name__}.")
        if not problems:
            return cls(**parts)
        # Not sound, but what is there can be looked at all the same: every problem at once, not the first only.
        if isinstance(parts.get("dataset"), Dataset) and all(parts.get(k) for k in ("name", "task", "model", "arms")):
            try:
                cls(**parts)
            except RecipeError as error:
                problems += error.problems
        raise RecipeError(*problems)

    def to_yaml(self, path: Path | None = None) -> str:
        """The recipe as YAML text; also written to `path` when one is given."""
        text = to_yaml(self.to_dict())
        if path is not None:
            path.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, path: Path | str) -> Recipe:
        """The recipe of a YAML file. Raises RecipeError that names the file, and the line where YAML is broken."""
        return cls.from_dict(read_yaml(Path(path)))

    def with_changes(self, changes: dict[str, Any]) -> Recipe:
        """A new recipe with `changes`, nested like the recipe itself, laid over it; a mapping is merged key by key."""
        return Recipe.from_dict(merge(self.to_dict(), changes))


def _arms(given: Any) -> tuple[dict[str, Arm], list[str]]:
    """The arms of plain data, and what is wrong with those that can't be made."""
    if not isinstance(given, dict):
        return {}, [] if given is None else [f"arms: expected a mapping of names to arms, got {type(given).__name__}."]
    arms: dict[str, Arm] = {}
    problems: list[str] = []
    for name, arm in given.items():
        try:
            arms[name] = arm if isinstance(arm, Arm) else Arm.from_dict(arm, f"arms.{name}")
        except RecipeError as error:
            problems += error.problems
    return arms, problems


def _recipe_problems(recipe: Recipe) -> list[str]:
    """Every problem of a recipe; empty when it is sound."""
    wrong_types = type_problems(recipe)
    found = list(wrong_types)
    if isinstance(recipe.dataset, Dataset):
        found += recipe.dataset.problems()
    if isinstance(recipe.arms, dict):
        found += _arm_problems(recipe)
    if isinstance(recipe.training, dict) and isinstance(recipe.task, str):
        found += training_problems(recipe.training, recipe.task)
    if wrong_types:
        return found  # the rest takes the types for granted
    found += _value_problems(recipe)
    if recipe.pretraining is not None:
        found += recipe.pretraining.problems()
    return found + _prompt_problems(recipe) + _also_problems(recipe) + _embedded_problems(recipe)


def _value_problems(recipe: Recipe) -> list[str]:
    found = [f"{key}: expected text, got {getattr(recipe, key)!r}." for key in ("name", "task", "model")
             if not getattr(recipe, key).strip()]  # fmt: skip
    if not _NAME.match(recipe.name):
        found.append(f"name: '{recipe.name}' must be letters, digits, '.', '_' and '-' only: it names a folder.")
    metrics = TASKS[recipe.task].metrics if recipe.task in TASKS else ("accuracy", "loss")
    chosen = {"task": TASKS, "metric": metrics, "batches": BATCHES}
    for key, valid in chosen.items():
        if getattr(recipe, key) not in valid:
            found.append(
                unknown(key, str(getattr(recipe, key)), valid, f"task {recipe.task}" if key == "metric" else "")
            )
    if recipe.attention not in (None, *ATTENTION):
        found.append(unknown("value", recipe.attention, ATTENTION, "attention"))
    for key in ("max_length", "max_row_tokens"):
        if getattr(recipe, key) < 2:
            found.append(f"{key}: expected a whole number of tokens of 2 or more, got {getattr(recipe, key)}.")
    if recipe.margin is not None and recipe.margin <= 0:
        found.append(f"margin: expected a number above 0, got {recipe.margin}.")
    if recipe.checkpoint_seconds < 0:
        found.append(f"checkpoint_seconds: expected 0 or more, got {recipe.checkpoint_seconds}.")
    if recipe.threads is not None and recipe.threads < 1:
        found.append(f"threads: expected a whole number of 1 or more, got {recipe.threads}.")
    return found + [unknown("check", c, GUARDS, "skip_checks") for c in recipe.skip_checks if c not in GUARDS]


def _arm_problems(recipe: Recipe) -> list[str]:
    found = [] if recipe.arms else ["arms: a recipe needs at least one arm."]
    for name, arm in recipe.arms.items():
        if not _NAME.match(str(name)) or name in ("base", "all"):
            found.append(f"arms: '{name}' can't name an arm: letters, digits, '.', '_', '-', not 'base', not 'all'.")
        if not hasattr(arm, "problems"):
            found.append(f"arms.{name}: expected an Arm (method, learning_rate), got {type(arm).__name__}.")
            continue
        found += arm.problems(f"arms.{name}")
        if name == "full" and arm.method != "full":
            found.append("arms.full: the arm of this name is what the others are held against: its method is 'full'.")
        if arm.method == "head" and recipe.task in LANGUAGE_TASKS:
            found.append(f"arms.{name}: 'head' needs a task head; a {recipe.task} model has only its vocabulary.")
    return found


def _prompt_problems(recipe: Recipe) -> list[str]:
    return [
        f"prompts[{i}]: expected a mapping with 'kind' and 'prompt', got {row!r}."
        for i, row in enumerate(recipe.prompts)
        if set(row) != {"kind", "prompt"}
    ]


def _also_problems(recipe: Recipe) -> list[str]:
    keys = [f.name for f in dataclasses.fields(Dataset)]
    found = []
    for name, changes in recipe.evaluate_also.items():
        where = f"evaluate_also.{name}"
        if name in ("train", "validation", "test", "pretrain"):
            found.append(f"evaluate_also: '{name}' is the name of a split of the recipe itself; choose another.")
        strange = [unknown("key", key, keys, where) for key in changes if key not in keys]
        found += strange
        if not strange:
            found += Dataset(**{**vars(recipe.dataset), **changes}).problems(where)
    return found


def _embedded_problems(recipe: Recipe) -> list[str]:
    """Keys that `--embedded` would not find; their values are checked when it is used."""
    names = [f.name for f in dataclasses.fields(recipe)]
    found = [unknown("key", key, names, "embedded") for key in recipe.embedded if key not in names]
    arms = recipe.embedded.get("arms")
    if isinstance(arms, dict):
        found += [unknown("arm", name, recipe.arms, "embedded.arms") for name in arms if name not in recipe.arms]
    return found
