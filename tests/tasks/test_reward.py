"""reward: tokens and losses as in trl, a head that is saved, scores of new texts."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest
import transformers
from datasets import Dataset as Rows
from rows import preference_rows
from small import FILLER, GOOD, compared_here
from trl import RewardConfig, RewardTrainer
from typer.testing import CliRunner

from peft_recipes import Arm, Dataset, RecipeError, train
from peft_recipes.cli.app import app
from peft_recipes.planning.plan import plan
from peft_recipes.tasks.registry import task_of
from peft_recipes.tasks.reward import per_pair


@pytest.fixture
def rank(prefer):
    """rank(kind) -> a reward recipe that runs in a few seconds: tiny Llama, 56 pairs, arms full, head and lora."""

    def make(kind="llama", **changes):
        arms = {**prefer(kind).arms, "head": Arm("head", learning_rate=1e-2)}
        training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False}
        options = {"name": "tiny-reward", "task": "reward", "arms": arms, "training": training, "prompts": []}
        return prefer(kind, **{**options, **changes})

    return make


def test_scores_give_accuracy_margin_and_loss_of_each_pair():
    figures = per_pair(np.array([[2.0, 1.0], [0.0, 0.5], [1.0, 1.0]]), 0.1)
    assert figures["preference_accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert figures["margin"].tolist() == [1.0, -0.5, 0.0]
    losses = [np.log1p(np.exp(-1)) + 0.9, np.log1p(np.exp(0.5)) + 0.025, np.log(2) + 0.4]
    assert figures["loss"] == pytest.approx(losses)


@pytest.mark.parametrize(
    ("kind", "training"),
    [("llama", {}), ("gpt2", {"center_rewards_coefficient": 0.1, "gradient_accumulation_steps": 2})],
)
def test_each_step_has_the_loss_of_a_plain_trl_script(rank, kind, training, tmp_path):
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False,
                "train_sampling_strategy": "sequential", "weight_decay": 0.0, **training}  # fmt: skip
    recipe = rank(kind, training=training)
    run = train(recipe, "full", output=tmp_path)
    task = task_of(recipe)
    ours = task.prepare()
    raw, _ = preference_rows(task.raw_splits()["train"], recipe.dataset, chat=kind == "llama")
    pairs = {row["id"]: {k: row[k] for k in ("prompt", "chosen", "rejected")} for row in raw}
    if kind == "gpt2":  # trl appends the end token as text, which a word-level tokenizer splits off
        pairs = {i: {**row, **{k: row[k] + " <eos>" for k in ("chosen", "rejected")}} for i, row in pairs.items()}
    transformers.set_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(recipe.model, num_labels=1)
    config = RewardConfig(
        output_dir=str(tmp_path / "trl"), seed=0, data_seed=0, learning_rate=1e-3, max_length=40, report_to="none",
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", disable_tqdm=True, **training,
    )  # fmt: skip
    theirs = RewardTrainer(model=model, args=config, processing_class=ours.processor,
                           train_dataset=Rows.from_list([pairs[i] for i in ours.ids["train"]]))  # fmt: skip
    for mine, other in zip(ours.splits["train"], theirs.train_dataset, strict=True):
        assert all(mine[key] == other[key] for key in ("chosen_ids", "rejected_ids"))
    theirs.train()
    losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert [loss for _, loss in run.data["training"]["losses"]] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("arm", ["full", "head", "lora"])
def test_every_arm_learns_the_preference_and_its_score_head_comes_back(rank, tmp_path, arm):
    run = train(rank(), arm, output=tmp_path)
    assert run.metrics["test"].keys() == {"preference_accuracy", "margin", "loss"}
    assert run.metrics["test"]["preference_accuracy"] > 0.8 and run.metrics["test"]["margin"] > 0
    assert run.data["checks"]["reload"] < 1e-6
    assert run.data["training"]["examples"] == 64 and run.data["training"]["tokens"] > 64 * 2
    rows = pandas.read_parquet(run.folder / "predictions.parquet")
    assert len(rows) == 16 and rows["margin"].mean() == pytest.approx(run.metrics["test"]["margin"])
    assert (rows["chosen_score"] - rows["rejected_score"]).tolist() == pytest.approx(rows["margin"].tolist())
    if arm == "lora":
        assert run.data["parameters"]["head"] == 32
        card = (run.folder / "README.md").read_text()
        assert "AutoModelForSequenceClassification" in card and "num_labels=1" in card


def test_an_answer_beyond_max_length_is_left_out_with_its_pair(rank, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "say good", "chosen": f"warm {word}", "rejected": f"cold {word} " * (1 + 9 * (i % 3 == 0))}
            for i, word in enumerate([*FILLER, *GOOD])]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    recipe = rank(dataset=Dataset(str(path), train=10, validation=6, test=6), max_length=12)
    prepared = task_of(recipe).prepare()
    assert any("have more than 12 tokens and were left out" in note for note in prepared.notes)
    with pytest.raises(RecipeError, match="--set max_length=8"):
        task_of(rank(max_length=4)).prepare()


def test_predict_prints_the_score_of_a_text_and_of_an_answer_to_a_prompt(rank, tmp_path):
    recipe = rank()
    run = train(recipe, "lora", output=tmp_path)
    prepared = task_of(recipe).prepare()
    (raw, _) = preference_rows(task_of(recipe).raw_splits()["test"], recipe.dataset, chat=True)
    scores = pandas.read_parquet(run.folder / "predictions.parquet").set_index("id")["chosen_score"]
    row = next(row for row in raw if row["id"] == prepared.ids["test"][0])
    prompt, answer = row["prompt"][0]["content"], row["chosen"][0]["content"]
    shown = CliRunner().invoke(app, ["predict", str(run.folder), "--prompt", prompt, "--text", answer, "--json"])
    assert shown.exit_code == 0, shown.output
    (found,) = json.loads(shown.stdout)
    assert found["score"] == pytest.approx(scores[row["id"]], abs=1e-5) and "probability" not in found
    plain = CliRunner().invoke(app, ["predict", str(run.folder), "--text", "warm film"])
    assert plain.exit_code == 0 and "warm film" in plain.output and "%" not in plain.output
    checked = CliRunner().invoke(app, ["check", str(run.folder)])
    assert checked.exit_code == 0, checked.output


def test_an_adapter_from_elsewhere_with_one_output_is_a_reward_model(rank, tmp_path):
    run = train(rank(), "lora", output=tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (alone / name).write_bytes((run.folder / name).read_bytes())
    shown = CliRunner().invoke(app, ["predict", str(alone), "--text", "warm film", "--json"])
    assert shown.exit_code == 0, shown.output
    assert set(json.loads(shown.stdout)[0]) == {"text", "score"}


def test_reward_models_can_be_planned_and_tried(rank):
    made_plan = plan(rank(), trial=True)
    for name, arm in made_plan["arms"].items():
        assert arm["steps"] == 8 and arm["memory"]["total"] > 0 and arm["trial"]["seconds_per_step"] > 0, name
    assert made_plan["arms"]["lora"]["head_parameters"] == made_plan["arms"]["head"]["trainable_parameters"] == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"center_reward_coefficient": 0.1}}, "Did you mean 'center_rewards_coefficient'"),
        ({"training": {"pad_token": "<pad>"}}, "its own is used"),
        ({"metric": "acuracy"}, "Did you mean 'preference_accuracy'|Valid: loss, preference_accuracy"),
    ],
)
def test_wrong_options_are_refused_with_the_nearest_name(rank, changes, message):
    with pytest.raises(RecipeError, match=message):
        rank(**changes)


def test_arms_are_compared_by_their_preferences_with_an_untrained_head_as_the_base(rank, tmp_path):
    data = compared_here(rank(), ["full", "lora"], [0], tmp_path).data
    assert {arm["status"] for arm in data["arms"].values()} == {"ok"} and data["metric"] == "preference_accuracy"
    assert len(data["differences"]["lora"]["ci95"]) == 2 and data["differences"]["lora"]["margin"] == 0.01
    text = (tmp_path / "tiny-reward" / "comparison.md").read_text()
    assert "preference accuracy" in text.lower()


def test_a_merged_reward_model_is_saved_with_its_head(rank, tmp_path):
    run = train(rank(), "lora", output=tmp_path)
    shown = CliRunner().invoke(app, ["merge", str(run.folder), "--output", str(tmp_path / "merged"), "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["after"] == pytest.approx(found["before"], abs=1e-4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 1 and model.score.weight.abs().sum() > 0


def test_what_a_reward_model_cannot_do_says_what_to_use(rank, classify, tmp_path):
    run = train(rank(), "lora", output=tmp_path)
    shown = CliRunner().invoke(app, ["generate", str(run.folder), "--prompt", "say good"])
    assert shown.exit_code == 2 and "reward" in shown.output + shown.stderr
    other = train(classify(), "lora", output=tmp_path)
    shown = CliRunner().invoke(app, ["predict", str(other.folder), "--prompt", "say", "--text", "good"])
    assert shown.exit_code == 2 and "--prompt is for reward models" in shown.output + shown.stderr
    shown = CliRunner().invoke(app, ["predict", str(run.folder), "--text", "warm " * 60])
    assert shown.exit_code == 2 and "shorten it" in shown.output + shown.stderr
