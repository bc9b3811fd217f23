"""The task classes by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_recipes.recipe.imports import import_module

if TYPE_CHECKING:
    from peft_recipes.recipe.recipe import Recipe
    from peft_recipes.tasks.base import Task

# task -> (module, class); a new task is a row here, a name in options.TASKS and a file.
_TASKS = {
    "text-classification": ("text_classification", "TextClassification"),
    "image-classification": ("image_classification", "ImageClassification"),
    "token-classification": ("token_classification", "TokenClassification"),
    "sft": ("sft", "SupervisedFineTuning"),
    "language-modeling": ("language_modeling", "LanguageModeling"),
    "dpo": ("dpo", "Preferences"),
    "grpo": ("grpo", "VerifiableRewards"),
    "kto": ("kto", "LabelledAnswers"),
    "reward": ("reward", "RewardModelling"),
    "seq2seq": ("seq2seq", "Seq2Seq"),
}


def task_of(recipe: Recipe) -> Task:
    """The task object of a recipe; its module, with the trainer it needs, is imported only now."""
    module, name = _TASKS[recipe.task]
    return getattr(import_module(f"peft_recipes.tasks.{module}"), name)(recipe)
