"""The table of training options names every field of the installed classes, and refuses before anything is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from peft_recipes.recipe import trainer_options
from peft_recipes.recipe.options import training_problems

CLASSES = {"text-classification": TrainingArguments, "sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig,
           "kto": KTOConfig, "grpo": GRPOConfig, "seq2seq": Seq2SeqTrainingArguments}  # fmt: skip


def test_the_table_names_every_field_of_the_installed_classes_and_no_other():
    fields = {field.name for options in CLASSES.values() for field in dataclasses.fields(options)}
    assert trainer_options.names() == fields


@pytest.mark.parametrize("task", CLASSES)
def test_every_refused_option_is_refused_by_name_unless_it_has_its_default(task):
    for field in dataclasses.fields(CLASSES[task]):
        row = trainer_options.row(field.name, CLASSES[task].__name__)
        if row.status == trainer_options.REFUSED and field.default is not dataclasses.MISSING:
            other = (not field.default) if isinstance(field.default, bool) else "strange"
            problems = training_problems({field.name: other}, task)
            assert problems and f"training.{field.name}" in problems[0], field.name
            assert row.why in problems[0], field.name
            assert not training_problems({field.name: field.default}, task), field.name


def test_a_metric_that_the_task_does_not_have_names_the_nearest():
    (problem,) = training_problems({"metric_for_best_model": "eval_acuracy"}, "text-classification")
    assert "eval_accuracy" in problem
    assert not training_problems({"metric_for_best_model": "perplexity"}, "sft")


def test_the_page_of_options_is_up_to_date():
    path = Path(__file__).parents[2] / "docs" / "write_options.py"
    spec = importlib.util.spec_from_file_location("write_options", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page()
