"""sft and language-modeling: labels as in trl, per-example losses, answers, saved weights."""

from __future__ import annotations

import pandas
import pytest
import torch
from peft import LoraConfig
from rows import sft_rows
from small import sentences
from trl import SFTConfig, SFTTrainer

from peft_recipes import Arm, Dataset, Recipe, RecipeError, train
from peft_recipes.tasks.registry import task_of


def language_model(folder, tmp_path, **changes):
    path = tmp_path / "text.csv"
    path.write_text("text\n" + "\n".join(text for text, _ in sentences(60, seed=5)) + "\n")
    options = {
        "name": "tiny-lm",
        "task": "language-modeling",
        "model": str(folder),
        "dataset": Dataset(str(path), train=40, validation=10, test=10),
        "max_length": 32,
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True},
        "arms": {"full": Arm(learning_rate=1e-3), "lora": Arm(LoraConfig(target_modules=["attn.c_attn"]), 1e-2)},
    }
    return Recipe(**{**options, **changes})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_examples_are_tokenised_and_labelled_as_in_trl(instruct, kind, tmp_path):

    recipe = instruct(kind, arms={"full": Arm()})
    task = task_of(recipe)
    ours = task.prepare()
    raw, _ = sft_rows(task.raw_splits()["train"], recipe.dataset, chat=kind == "llama")
    by_id = {row["id"]: row for row in raw}
    rows = raw.from_list([{k: by_id[i][k] for k in ("prompt", "completion")} for i in ours.ids["train"]])
    model, _ = task.load_base(ours)
    config = SFTConfig(output_dir=str(tmp_path), max_length=48, use_cpu=True, bf16=False, report_to="none")
    theirs = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=ours.processor).train_dataset
    for mine, other in zip(ours.splits["train"], theirs, strict=True):
        assert mine["input_ids"] == other["input_ids"]
        assert mine["labels"] == other["labels"]


def test_the_end_token_has_a_label(instruct):
    for kind, end in (("llama", "<|end|>"), ("gpt2", "<eos>")):
        prepared = task_of(instruct(kind, arms={"full": Arm()})).prepare()
        number = prepared.processor.convert_tokens_to_ids(end)
        assert all(number in row["labels"] for row in prepared.splits["train"])


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_an_sft_arm_lowers_the_loss_and_saves_only_its_own_weights(instruct, tmp_path, arm):
    run = train(instruct(), arm, output=tmp_path)
    base = train(instruct(), "base", output=tmp_path)
    assert run.metrics["test"]["loss"] < base.metrics["test"]["loss"]
    assert run.metrics["test"].keys() == {"loss", "perplexity", "token_accuracy", "bits_per_byte"}
    assert run.data["answers"][0]["prompt"] == "say good in a film" and isinstance(
        run.data["answers"][0]["answer"], str
    )
    assert run.data["training"]["tokens_per_second"] > 0
    assert run.data["generation_tokens_per_second"]["base"] > 0
    assert run.data["checks"]["reload"] < 1e-6
    assert (run.folder / "adapter_model.safetensors").exists() == (arm == "lora")
    assert (run.folder / "model.safetensors").exists() == (arm == "full")


def test_per_example_losses_equal_those_of_a_plain_forward(instruct, tmp_path):
    recipe = instruct()
    run = train(recipe, "base", output=tmp_path)
    rows = pandas.read_parquet(run.folder / "predictions.parquet")
    task = task_of(recipe)
    prepared = task.prepare()
    model, _ = task.load_base(prepared)
    total = count = 0.0
    for row, evaluated in zip(prepared.splits["test"], rows.itertuples(), strict=True):
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model.eval()(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
        tokens = int((labels[0, 1:] != -100).sum())
        assert (evaluated.loss, evaluated.tokens) == (pytest.approx(loss, rel=1e-5), tokens)
        total, count = total + loss * tokens, count + tokens
    assert run.metrics["test"]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_language_modeling_labels_every_token(tiny, tmp_path):
    recipe = language_model(tiny("gpt2"), tmp_path)
    prepared = task_of(recipe).prepare()
    assert all(row["labels"] == row["input_ids"] for row in prepared.splits["train"])
    assert all(row["labels"][-1] == prepared.processor.eos_token_id for row in prepared.splits["train"])
    run, base = (train(recipe, arm, output=tmp_path / "o") for arm in ("lora", "base"))
    assert run.metrics["test"]["loss"] < base.metrics["test"]["loss"]


def test_examples_without_a_label_after_truncation_are_left_out_and_counted(instruct):
    prepared = task_of(instruct(max_length=9)).prepare()
    assert any("no labelled token after truncation" in note for note in prepared.notes)
    assert all(any(label != -100 for label in row["labels"][1:]) for row in prepared.splits["train"])


def test_prompts_longer_than_max_length_say_what_to_set(instruct, tmp_path):
    with pytest.raises(RecipeError, match="--set max_length=8"):
        train(instruct(max_length=4), "lora", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_missing_text_column_names_the_nearest(tiny, tmp_path):
    recipe = language_model(tiny("gpt2"), tmp_path)
    recipe.dataset.text = "txt"
    with pytest.raises(RecipeError, match="Did you mean 'text'"):
        task_of(recipe).prepare()
