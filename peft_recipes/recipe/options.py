"""The tables of tasks, training options and guards, and the check of a recipe's `training` options."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from dataclasses import dataclass
from typing import Any

from peft_recipes.errors import nearest
from peft_recipes.recipe.type_checks import describe, fits


@dataclass(frozen=True)
class TaskOptions:
    """One row of `TASKS`.

    metrics: the metrics arms can be compared by; the first is the default.
    auto_class: transformers' auto class of the base model.
    arguments: the class of the training options, "module.name".
    peft_task_type: PEFT's task type; None for images, which PEFT has none for.
    """

    metrics: tuple[str, ...]
    auto_class: str
    arguments: str
    peft_task_type: str | None


# Every task by name. A new task is a row here, a row in tasks/registry.py and a file in tasks/.
TASKS = {
    "text-classification": TaskOptions(
        ("accuracy", "loss"), "AutoModelForSequenceClassification", "transformers.TrainingArguments", "SEQ_CLS"
    ),
    "image-classification": TaskOptions(
        ("accuracy", "loss"), "AutoModelForImageClassification", "transformers.TrainingArguments", None
    ),
    "sft": TaskOptions(("loss",), "AutoModelForCausalLM", "trl.SFTConfig", "CAUSAL_LM"),
    "language-modeling": TaskOptions(("loss",), "AutoModelForCausalLM", "trl.SFTConfig", "CAUSAL_LM"),
    "dpo": TaskOptions(("preference_accuracy", "loss"), "AutoModelForCausalLM", "trl.DPOConfig", "CAUSAL_LM"),
}
# Tasks trained by SFTTrainer.
CAUSAL_TASKS = tuple(name for name, task in TASKS.items() if task.arguments == "trl.SFTConfig")
# Tasks of a causal language model, whose only head is the LM head.
LANGUAGE_TASKS = tuple(name for name, task in TASKS.items() if task.auto_class == "AutoModelForCausalLM")

# Trainer options that are set elsewhere: name -> where.
_OWNED = {
    "learning_rate": "arms.<ARM>.learning_rate, each arm has its own",
    "seed": "--seed or --seeds",
    "data_seed": "--seed or --seeds",
    "output_dir": "--output",
    "max_length": "max_length of the recipe itself",
    "remove_unused_columns": "nothing: the task decides it",
    "push_to_hub": "`peft-recipes push`",
    "hub_token": "`hf auth login`; a recipe never holds a token",
    "resume_from_checkpoint": "--resume",
    "packing": "`batches` of the recipe itself: shared-prefix packing is exact",
    "padding_free": "`batches` of the recipe itself: shared-prefix packing has no padding",
    "completion_only_loss": "the data: the loss is on the answers, or on every token of plain text",
    "assistant_only_loss": "the data: the loss is on the last answer",
    "dataset_text_field": "dataset.text",
    "chat_template_path": "the model: its own template is used",
    "eos_token": "the model: its own is used",
    "pad_token": "the model: its own is used",
    "precompute_ref_log_probs": "nothing: the reference is computed once, before training",
    "precompute_ref_batch_size": "training.per_device_eval_batch_size",
    "sync_ref_model": "nothing: the reference stays the untrained base",
    "truncation_mode": "nothing: answers are cut at their end, at max_length",
    "model_init_kwargs": "the recipe itself (model, attention, trust_remote_code)",
}

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def training_problems(training: dict[str, Any], task: str) -> list[str]:
    """Check a recipe's `training` against the fields of the task's own class (TrainingArguments, SFTConfig, ...)."""
    if not training:
        return []
    module, _, name = TASKS[task if task in TASKS else "text-classification"].arguments.partition(".")
    arguments = getattr(importlib.import_module(module), name)
    hints = typing.get_type_hints(arguments)
    options = {f.name: hints[f.name] for f in dataclasses.fields(arguments)}
    problems = []
    for key, value in training.items():
        if key in _OWNED:
            problems.append(f"training.{key}: not set here but by {_OWNED[key]}.")
        elif key not in options:  # only the nearest: there are more than a hundred valid ones
            problems.append(
                f"Unknown key '{key}' in training.{nearest(key, options)} "
                "Valid: the fields of transformers' TrainingArguments."
            )
        elif not fits(list(value) if isinstance(value, tuple) else value, options[key]):
            problems.append(f"training.{key}: expected {describe(options[key])}, got {value!r}.")
        elif key in _AT_LEAST_ONE and value < 1:
            problems.append(f"training.{key}: expected 1 or more, got {value!r}.")
        elif key == "num_train_epochs" and value <= 0:
            problems.append(f"training.{key}: expected a number above 0, got {value!r}.")
    return problems


# Every guard by name, with what it checks. `skip_checks` of a recipe turns guards off.
GUARDS = {
    "memory": "the arm's estimated peak memory fits the machine, else the run does not start",
    "classes": "the train split has more than one class",
    "duplicates": "no training example is also in a later split; such examples are removed from train",
    "labelled-tokens": "every example keeps a labelled token after truncation; others are left out",
    "end-token": "in SFT some end-of-text token has a label, or the model would never learn to stop",
    "padding": "the padding token is set in tokenizer and model, and padding has no label",
    "targets": "every target name matches a module",
    "trainable": "at least one weight is trainable",
    "saved": "every trainable or new weight (a task head) is saved with the adapter",
    "finite-loss": "the loss is finite, else the run stops",
    "learning": "the adapter's weights have changed after the first steps",
    "frozen": "the frozen weights are the same after training",
    "reload": "the saved adapter, loaded on a fresh base, gives the same outputs",
    "fresh-process": "in a comparison, each adapter gives the same outputs in a process that did not train it",
    "merge": "the merged model gives the same outputs",
    "adapter-only": "the folder holds the adapter without the base",
}
