"""Stand-ins for a draft's model and data: what `--embedded` runs in their place, without a Hub."""

from __future__ import annotations

from typing import Any

from peft_recipes.drafting.base import CAUSAL, IMAGES, read_base
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.dataset import EMBEDDED, Dataset
from peft_recipes.recipe.recipe import Recipe

_SMOLLM2, _GPT2, _DISTILBERT = "smollm2-135m-instruct", "gpt2-docstrings", "distilbert-minilm-l6"
# task -> the model, the dataset, and the columns of it whose names are not the defaults.
_OF_TASK: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text-classification": (_DISTILBERT, "docstring-topics", {}),
    "token-classification": (_DISTILBERT, "docstring-names", {"label": "spans"}),
    "image-classification": ("efficientnet-lite0", "mnist", {}),
    "sft": (_SMOLLM2, "docstring-questions", {}),
    "language-modeling": (_GPT2, "stdlib-functions", {}),
    "dpo": (_SMOLLM2, "docstring-preferences", {}),
    "reward": (_SMOLLM2, "docstring-preferences", {}),
    "kto": (_SMOLLM2, "docstring-preferences", {}),
    "grpo": (_SMOLLM2, "arithmetic", {"prompt": "question", "completion": "answer"}),
}
_COLUMNS = ("text", "label", "image", "prompt", "completion", "chosen", "rejected", "format", "labels", "problem_type",
            "name", "revision", "train_split", "validation_split", "test_split")  # fmt: skip
_SIZES = {"train": 400, "validation": 40, "test": 100}


def section(recipe: Recipe) -> dict[str, Any]:
    """The `embedded` of a recipe: a stand-in model and dataset of its task, and what differs because of them."""
    if recipe.uses_stand_ins or recipe.task not in _OF_TASK:
        return {}
    model, dataset, columns = _OF_TASK[recipe.task]
    if recipe.task == "text-classification" and recipe.dataset.problem_type:
        return {}  # the stand-in has one class for each text
    default = Dataset("")
    wanted = {name: getattr(default, name) for name in _COLUMNS} | columns
    differs = {name: value for name, value in wanted.items() if getattr(recipe.dataset, name) != value}
    made: dict[str, Any] = {
        "model": f"{EMBEDDED}{model}",
        "dataset": {"path": f"{EMBEDDED}{dataset}", **differs, **_SIZES},
    }
    if recipe.task != "image-classification" and recipe.max_length != 128:
        made["max_length"] = 128
    return made


def stand_in_data(model: str, trust_remote_code: bool) -> str:
    """The stand-in dataset for a model."""
    kind = read_base(model, trust_remote_code).kind
    task = {IMAGES: "image-classification", CAUSAL: "sft"}.get(kind, "text-classification")
    return f"{EMBEDDED}{_OF_TASK[task][1]}"


def stand_in_model(task: str | None) -> str:
    """The stand-in model of a task."""
    if task is None or task not in _OF_TASK:
        raise RecipeError(
            f"--embedded: for which task is the stand-in model? Name one: --task {', --task '.join(_OF_TASK)}; or "
            "name a --model."
        )
    return f"{EMBEDDED}{_OF_TASK[task][0]}"
