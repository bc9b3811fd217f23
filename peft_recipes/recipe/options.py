"""A recipe's `training` options, held against the real fields of TrainingArguments, SFTConfig and DPOConfig."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from dataclasses import dataclass
from typing import Any

from peft_recipes.errors import nearest


@dataclass(frozen=True)
class TaskOptions:
    """One row of `TASKS`.

    metrics: what arms can be compared by; the first is the default. auto_class: transformers' class of the base model.
    arguments: the class of the training options, "module.name". peft_task_type: PEFT's name of the task, None where it
    has none (images; the plain PeftModel is right there).
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
# The tasks that SFTTrainer trains.
CAUSAL_TASKS = tuple(name for name, task in TASKS.items() if task.arguments == "trl.SFTConfig")
# The tasks of a causal language model: its LM head is its only head.
LANGUAGE_TASKS = tuple(name for name, task in TASKS.items() if task.auto_class == "AutoModelForCausalLM")


# TrainingArguments that a recipe or the comparison decides: name -> where to set it instead.
_OWNED = {
    "learning_rate": "arms.<ARM>.learning_rate, each arm has its own",
    "seed": "--seed or --seeds",
    "data_seed": "--seed or --seeds",
    "output_dir": "--output",
    "max_length": "max_length of the recipe itself",
    "remove_unused_columns": "nothing: the task decides it",
    "push_to_hub": "`peft-recipes push`",
    "hub_token": "`hf auth login`; a token never stands in a recipe",
    "resume_from_checkpoint": "--resume",
    "packing": "`batches` of the recipe itself: its shared rows pack, exactly",
    "padding_free": "`batches` of the recipe itself: its shared rows have no padding",
    "completion_only_loss": "the rows: the loss is on the answers, or on all of a plain text",
    "assistant_only_loss": "the rows: the loss is on the last answer",
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

# Counts that no run can do with below 1.
_FROM_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def training_problems(training: dict[str, Any], task: str) -> list[str]:
    """What is wrong with a recipe's `training`, held against the fields of its task's own class."""
    if not training:
        return []
    module, _, name = TASKS[task if task in TASKS else "text-classification"].arguments.partition(".")
    arguments = getattr(importlib.import_module(module), name)
    fields = {f.name: f for f in dataclasses.fields(arguments)}
    found = []
    for key, value in training.items():
        if key in _OWNED:
            found.append(f"training.{key}: not set here but by {_OWNED[key]}.")
        elif key not in fields:
            found.append(_unknown_option(key, fields))
        elif wrong := _wrong_type(value, str(fields[key].type)):
            found.append(f"training.{key}: expected {wrong}, got {value!r}.")
        elif key in _FROM_ONE and value < 1:
            found.append(f"training.{key}: expected 1 or more, got {value!r}.")
        elif key == "num_train_epochs" and value <= 0:
            found.append(f"training.{key}: expected a number above 0, got {value!r}.")
    return found


def _unknown_option(key: str, fields: dict[str, Any]) -> str:
    """One line for an unknown training option; the hundred valid ones are not listed, only the nearest."""
    return (
        f"Unknown key '{key}' in training.{nearest(key, fields)} Valid: the fields of transformers' TrainingArguments."
    )


def _wrong_type(value: Any, annotation: str) -> str:
    """What was expected, where a value can't be of the annotated kind; empty where it fits or can't be told."""
    kinds = {k for k in ("bool", "int", "float", "str", "dict", "list") if re.search(rf"\b{k}\b", annotation)}
    if value is None and "None" not in annotation:
        return " or ".join(sorted(kinds)) or "a value"
    if not kinds or value is None or re.search(r"Strategy|Type|Names", annotation):
        return ""
    fits = (
        (isinstance(value, bool) and "bool" in kinds)
        or (isinstance(value, int) and not isinstance(value, bool) and kinds & {"int", "float"})
        or (isinstance(value, float) and "float" in kinds and math.isfinite(value))
        or (isinstance(value, str) and "str" in kinds)
        or (isinstance(value, dict) and "dict" in kinds)
        or (isinstance(value, (list, tuple)) and "list" in kinds)
    )
    return "" if fits else " or ".join(sorted(kinds))


GUARDS = {
    "memory": "an arm whose estimated peak is beyond the machine's memory is refused before the start",
    "classes": "more than one class in the train split",
    "duplicates": "no example stands in train and in a later split: such examples are taken out of train",
    "labelled-tokens": "every example keeps a token to learn after the cut; those that do not are left out",
    "end-token": "an end-of-text token carries a label in sft, or the model never learns to stop",
    "padding": "the padding token is set in tokenizer and model, and padding carries no label",
    "targets": "every target name hits a module",
    "trainable": "something learns",
    "saved": "whatever learns or is new (a task head) is stored with the adapter",
    "finite-loss": "a loss that is not finite stops the run",
    "learning": "after the first steps an adapter's weights have moved",
    "frozen": "the frozen weights are after training what they were before",
    "reload": "what was saved, loaded onto a fresh base, gives the same outputs",
    "fresh-process": "in a comparison, each adapter loaded once in a process that did not train it answers the same",
    "merge": "the merged model gives the same outputs",
    "adapter-only": "the folder holds the adapter and not the base",
}
