"""The tables of tasks, training options and guards, and the check of a recipe's `training` options."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from peft_recipes.errors import nearest, unknown
from peft_recipes.recipe import trainer_options
from peft_recipes.recipe.dataset import CLASSES, MULTI_LABEL, REGRESSION
from peft_recipes.recipe.imports import import_module
from peft_recipes.recipe.metrics import ANSWER_METRICS
from peft_recipes.recipe.type_checks import describe, fits


@dataclass(frozen=True)
class TaskOptions:
    """One row of `TASKS`.

    metrics: the metrics arms can be compared by; the first is the default.
    auto_class: transformers' auto class of the base model.
    arguments: the class of the training options, "module.name".
    peft_task_type: PEFT's task type; None for images, which PEFT has none for.
    reported: every metric of an evaluation, by which the best model can be chosen.
    """

    metrics: tuple[str, ...]
    auto_class: str
    arguments: str
    peft_task_type: str | None
    reported: tuple[str, ...]


# The metrics of each problem type of text-classification; the first is the default where a recipe names the type.
PROBLEM_METRICS = {
    CLASSES: ("accuracy", "macro_f1", "mcc", "loss"),
    MULTI_LABEL: ("micro_f1", "macro_f1", "accuracy", "loss"),
    REGRESSION: ("pearson", "spearman", "mse", "loss"),
}
_TEXT_METRICS = tuple(dict.fromkeys(name for names in PROBLEM_METRICS.values() for name in names))
_ENTITY_METRICS = ("loss", "entity_f1", "entity_precision", "entity_recall", "token_accuracy")
_TOKEN_METRICS = ("loss", "perplexity", "token_accuracy")
_ANSWERS = ("ended", "answer_tokens", "empty_answers")
_REWARD_METRICS = ("loss", "preference_accuracy", "margin")
_PAIR_METRICS = ("loss", "preference_accuracy", "likelihood_accuracy", "margin")

# Every task by name. A new task is a row here, a row in tasks/registry.py and a file in tasks/.
TASKS = {
    "text-classification": TaskOptions(
        _TEXT_METRICS,
        "AutoModelForSequenceClassification",
        "transformers.TrainingArguments",
        "SEQ_CLS",
        _TEXT_METRICS,
    ),
    "image-classification": TaskOptions(
        PROBLEM_METRICS[CLASSES],
        "AutoModelForImageClassification",
        "transformers.TrainingArguments",
        None,
        PROBLEM_METRICS[CLASSES],
    ),
    "token-classification": TaskOptions(
        ("entity_f1", "token_accuracy", "loss"),
        "AutoModelForTokenClassification",
        "transformers.TrainingArguments",
        "TOKEN_CLS",
        _ENTITY_METRICS,
    ),
    "sft": TaskOptions(("loss", *ANSWER_METRICS), "AutoModelForCausalLM", "trl.SFTConfig", "CAUSAL_LM", _TOKEN_METRICS),
    "language-modeling": TaskOptions(("loss",), "AutoModelForCausalLM", "trl.SFTConfig", "CAUSAL_LM", _TOKEN_METRICS),
    "dpo": TaskOptions(
        ("preference_accuracy", "loss"), "AutoModelForCausalLM", "trl.DPOConfig", "CAUSAL_LM", _PAIR_METRICS
    ),
    "reward": TaskOptions(
        ("preference_accuracy", "loss"),
        "AutoModelForSequenceClassification",
        "trl.RewardConfig",
        "SEQ_CLS",
        _REWARD_METRICS,
    ),
    "kto": TaskOptions(
        ("preference_accuracy", "loss"), "AutoModelForCausalLM", "trl.KTOConfig", "CAUSAL_LM", _REWARD_METRICS
    ),
    "grpo": TaskOptions(
        ("reward", *ANSWER_METRICS), "AutoModelForCausalLM", "trl.GRPOConfig", "CAUSAL_LM", ("reward", *_ANSWERS)
    ),
    "seq2seq": TaskOptions(
        ("rougeL", *(metric for metric in ANSWER_METRICS if metric != "rougeL"), "loss"),
        "AutoModelForSeq2SeqLM",
        "transformers.Seq2SeqTrainingArguments",
        "SEQ_2_SEQ_LM",
        _TOKEN_METRICS,
    ),
}
# Tasks of a language model, whose only head is the LM head.
LANGUAGE_TASKS = tuple(
    name for name, task in TASKS.items() if task.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
)
# Tasks whose head the pretrained base lacks.
HEAD_TASKS = tuple(name for name, task in TASKS.items() if task.auto_class.endswith("Classification"))
# Tasks whose loss and token accuracy are means over labelled tokens, not over examples.
TOKEN_TASKS = tuple(name for name, task in TASKS.items() if "token_accuracy" in task.reported)


def metrics_of(task: str, problem_type: str | None = None) -> tuple[str, ...]:
    """The metrics that arms of a task can be compared by, the default first.

    problem_type: of a text classifier, where the recipe names it.
    """
    if task == "text-classification" and problem_type in PROBLEM_METRICS:
        return PROBLEM_METRICS[problem_type]
    return TASKS[task].metrics if task in TASKS else ("accuracy", "loss")


# Owned options that may be set to the value they have anyway.
_LOGGING = {"logging_strategy": "steps", "logging_steps": 1, "logging_nan_inf_filter": False}
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def training_problems(training: dict[str, Any], task: str) -> list[str]:
    """Check a recipe's `training` against the fields of the task's own class (TrainingArguments, SFTConfig, ...)."""
    if not training:
        return []
    module, _, name = TASKS[task if task in TASKS else "text-classification"].arguments.partition(".")
    arguments = getattr(import_module(module), name)
    hints = typing.get_type_hints(arguments)
    options = {f.name: hints[f.name] for f in dataclasses.fields(arguments)}
    defaults = {f.name: f.default for f in dataclasses.fields(arguments)}
    problems = []
    for key, value in training.items():
        row = trainer_options.row(key, name)
        at_default = key in defaults and value == defaults[key]
        if row.status == trainer_options.OWNED and not (key in _LOGGING and value == _LOGGING[key]):
            fixed = row.why.startswith(trainer_options.FIXED)
            where = (
                f"can't be set: {row.why.removeprefix(trainer_options.FIXED)}"
                if fixed
                else f"not set here but by {row.why}"
            )
            problems.append(f"training.{key}: {where}.")
        elif key not in options:  # only the nearest: there are more than a hundred valid ones
            problems.append(
                f"Unknown key '{key}' in training.{nearest(key, options)} "
                "Valid: the fields of transformers' TrainingArguments."
            )
        elif row.status == trainer_options.REFUSED and not at_default:
            problems.append(f"training.{key}: refused: {row.why}.")
        elif isinstance(value, str) and (why := trainer_options.REFUSED_VALUES.get((key, value))):
            problems.append(f"training.{key}: {value} is refused: {why}.")
        elif not at_default and (why := _without_effect(key, training)):
            problems.append(f"training.{key}: {why}")
        elif not fits(list(value) if isinstance(value, tuple) else value, options[key]):
            problems.append(f"training.{key}: expected {describe(options[key])}, got {value!r}.")
        elif key in _AT_LEAST_ONE and value < 1:
            problems.append(f"training.{key}: expected 1 or more, got {value!r}.")
        elif key == "num_train_epochs" and value <= 0:
            problems.append(f"training.{key}: expected a number above 0, got {value!r}.")
    return problems + _best_metric_problems(training, task) + _tracker_problems(training)


def _without_effect(option: str, training: dict[str, Any]) -> str | None:
    """Return why an option has no effect beside the others, if so."""
    other, values = trainer_options.NEEDS.get(option, ("", ()))
    given = training.get(other)
    if not values or set(values) & set(given if isinstance(given, (list, tuple)) else [given]):
        return None
    return f"no effect unless {other} is {' or '.join(values)}. Set training.{other} as well, or leave it out."


def _best_metric_problems(training: dict[str, Any], task: str) -> list[str]:
    """Check that metric_for_best_model names a metric of the task."""
    chosen = training.get("metric_for_best_model")
    if not isinstance(chosen, str) or task not in TASKS:
        return []
    valid = TASKS[task].reported
    if chosen.removeprefix("eval_") in valid:
        return []
    return [unknown("metric", chosen, [f"eval_{metric}" for metric in valid], "training.metric_for_best_model")]


def _tracker_problems(training: dict[str, Any]) -> list[str]:
    """Check that report_to names trackers that transformers knows."""
    given = training.get("report_to")
    names = [given] if isinstance(given, str) else given
    if not names or not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return []
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    where, alone = "training.report_to", [name for name in names if name in ("all", "none")]
    if alone and len(names) > 1:
        return [f"{where}: {alone[0]} stands alone, and the list has {len(names)} names. Leave one or the other out."]
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    return [unknown("tracker", name, known, where) for name in names if name not in known]


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
