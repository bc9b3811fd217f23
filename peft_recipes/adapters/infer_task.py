"""Infer what a saved adapter is for: its task, its class names, its base and how that was quantised.

A run's folder has all of it in recipe.yaml and run.json. For an adapter trained elsewhere it follows from
adapter_config.json, from the shape of its head and from the base's configuration.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peft_recipes.adapters.saved import CONFIG, RECIPE_FILE, SavedAdapter
from peft_recipes.data.prepared import Prepared
from peft_recipes.errors import RecipeError
from peft_recipes.models import bases
from peft_recipes.models.quantisation import stored_quantisation
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import MULTI_LABEL, REGRESSION, Dataset
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import resolved_recipe
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.registry import task_of

_PEFT_TASKS = {
    "CAUSAL_LM": "language-modeling",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "seq2seq",
    "TOKEN_CLS": "token-classification",
}
# The task of a base, by the end of its class name: for adapters saved without PEFT's task type.
_MODEL_CLASSES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "language-modeling",
    "LMHeadModel": "language-modeling",
    "ForConditionalGeneration": "seq2seq",
    "MTModel": "seq2seq",  # Marian's
}
# Head weights with one row per class.
_HEADS = tuple(
    f".{name}.weight" for name in ("classifier", "score", "classifier.out_proj", "classification_head.out_proj")
)


def infer_task(saved: SavedAdapter, base: str | None, trust_remote_code: bool) -> Task:
    """Return the task of an adapter, with its base (or `base` instead) as the recipe's model."""
    if saved.is_run:
        recipe = resolved_recipe(saved.folder / RECIPE_FILE)
        if base is None and bases.is_local(recipe.model) and not Path(recipe.model).expanduser().exists():
            raise RecipeError(f"{saved.folder / RECIPE_FILE} names its base '{recipe.model}', and there is no such "
                              "folder here. Name where the base is: --base MODEL.")  # fmt: skip
    else:
        recipe = Recipe(name="adapter", task="language-modeling", model=base or _named_base(saved),
                        dataset=Dataset("embedded:none"), trust_remote_code=trust_remote_code,
                        arms={"full": Arm(learning_rate=1.0)})  # fmt: skip
        recipe = dataclasses.replace(recipe, task=_task_name(saved, recipe), metric=None)
        if recipe.task == "text-classification":
            recipe = _with_problem_type(saved, recipe)
    # A downloaded recipe must not be able to run code, its base's or a score's: only the user can allow it.
    own_code: dict[str, Any] = {}
    if (recipe.score or recipe.reward) and not trust_remote_code:
        own_code = {"metric": "loss", "score": None, "generation": {}, "answer_pattern": None, "judge": None}
    if recipe.reward and not trust_remote_code:
        training = {key: value for key, value in recipe.training.items() if key in ("use_cpu", "bf16", "fp16")}
        own_code |= {"task": "sft", "reward": None, "training": training}
    settings = {"model": base or recipe.model, "trust_remote_code": trust_remote_code, **own_code}
    return task_of(dataclasses.replace(recipe, **settings))


def _named_base(saved: SavedAdapter) -> str:
    """Return the base that the adapter names. Raises RecipeError for none, and for a folder that is not there.

    PEFT looks for a relative path in the current folder, so a base next to the adapter is suggested, not taken.
    """
    named = saved.config.base_model_name_or_path
    if not named:
        raise RecipeError(f"{saved.folder / CONFIG} names no base model. Name it: --base MODEL.")
    near = saved.folder / Path(named).expanduser()
    if not Path(named).expanduser().exists() and (near / "config.json").is_file():
        raise RecipeError(f"{saved.folder / CONFIG} names its base '{named}', which is not in the current folder. "
                          f"There is one as seen from the adapter: --base {near}.")  # fmt: skip
    if bases.is_local(named) and not Path(named).expanduser().exists():
        raise RecipeError(f"{saved.folder / CONFIG} names its base '{named}', and there is no such folder here. "
                          "Name where the base is: --base MODEL.")  # fmt: skip
    return named


def _class_of(ending_of: str) -> str | None:
    return next((task for ending, task in _MODEL_CLASSES.items() if ending_of.endswith(ending)), None)


def _task_name(saved: SavedAdapter, recipe: Recipe) -> str:
    """Return the task: by PEFT's task type, else by the model class that PEFT noted, else by the base's own class."""
    found = _PEFT_TASKS.get(saved.config.task_type)
    found = found or _class_of(str((saved.config.auto_mapping or {}).get("base_model_class")))
    if found is None and saved.config.task_type is None:
        architectures = bases.load_config(recipe).architectures or []
        found = next((task for task in map(_class_of, architectures) if task), None)
    if found == "text-classification" and _scores_texts(saved):
        return "reward"
    if found is not None:
        return found
    raise RecipeError(
        f"{saved.folder / CONFIG}: task_type {saved.config.task_type!r} does not tell what kind of model the "
        f"base is, and neither does the base's config.json. Set task_type there to one of {', '.join(_PEFT_TASKS)}."
    )


def _with_problem_type(saved: SavedAdapter, recipe: Recipe) -> Recipe:
    """Return the recipe with what the adapter predicts: a number if its head (or its base's) has one output, else as
    its base's configuration says.
    """
    config = bases.load_config(recipe)
    sizes = _head_sizes(saved) or [config.num_labels]
    several = getattr(config, "problem_type", None) == MULTI_LABEL
    found = REGRESSION if sizes[-1] == 1 else MULTI_LABEL if several else None
    return dataclasses.replace(recipe, dataset=dataclasses.replace(recipe.dataset, problem_type=found), metric=None)


def _scores_texts(saved: SavedAdapter) -> bool:
    """Whether the saved head is a reward model's: one output, named as a decoder's; an encoder's is a regression's."""
    heads = {name: len(tensor) for name, tensor in saved.tensors.items() if name.endswith(_HEADS)}
    return any(name.endswith(".score.weight") and outputs == 1 for name, outputs in heads.items())


def _head_sizes(saved: SavedAdapter) -> list[int]:
    """Return the number of outputs of each saved head."""
    return [tensor.shape[0] for name, tensor in saved.tensors.items() if name.endswith(_HEADS)]


def class_names(saved: SavedAdapter, recipe: Recipe) -> list[str] | None:
    """Return the class names of a classifier, or None if the adapter has no head of its own (the base's is used), or
    predicts a number.

    The names are those of the run's data; else the base's, if there are as many as the saved head has rows; else
    numbers.
    """
    if recipe.dataset.problem_type == REGRESSION:
        return None
    try:
        if saved.run.get("labels"):
            return list(saved.run["labels"])
        if saved.run.get("per_class"):
            return [row["label"] for row in saved.run["per_class"]]
    except (KeyError, TypeError):
        pass
    if recipe.dataset.labels:
        return list(recipe.dataset.labels)
    if recipe.task == "reward" or not (sizes := _head_sizes(saved)):
        return None
    names = [str(name) for name in (bases.load_config(recipe).id2label or {}).values()]
    named = len(names) == sizes[-1] and not all(name.startswith("LABEL_") for name in names)
    return names if named else [str(i) for i in range(sizes[-1])]


def base_config(saved: SavedAdapter, task: Task) -> Any:
    """Load the configuration of the adapter's base, with as many classes as the adapter has."""
    prepared = Prepared({}, {}, "", labels=class_names(saved, task.recipe))
    return bases.load_config(task.recipe, **task.base_options(prepared))


def base_quantisation(saved: SavedAdapter, recipe: Recipe) -> str | None:
    """Return how the base is quantised: as run.json says of the training, or as the base itself is stored.

    None if it is not, or if that is unknown. Raises RecipeError for a base that another library has quantised.
    """
    if recipe.model != bases.SMALL_CNN and (stored := stored_quantisation(bases.load_config(recipe), recipe.model)):
        return stored
    try:
        return recipe.arms[saved.run["arm"]].quantise
    except (KeyError, TypeError):
        return None
