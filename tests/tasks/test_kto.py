"""kto: formats that name the row, tokens and losses as in trl, figures by prompt compared with the untrained base."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest
import transformers
from datasets import Dataset as Rows
from peft import AdaptionPromptConfig
from rows import unpaired_rows
from small import compared_here
from trl import KTOConfig, KTOTrainer
from typer.testing import CliRunner

from peft_recipes import Arm, Dataset, RecipeError, train
from peft_recipes.arms.selection import choose_arms
from peft_recipes.cli.app import app
from peft_recipes.data.preferences import EMPTY, NO_PROMPT
from peft_recipes.hardware.device import choose
from peft_recipes.planning.plan import plan
from peft_recipes.tasks.kto import _rotated, per_example, per_prompt
from peft_recipes.tasks.registry import task_of


@pytest.fixture
def label(prefer):
    """label(kind) -> a kto recipe that runs in a few seconds: tiny Llama, answers of 56 pairs, arms full and lora."""

    def make(kind="llama", **changes):
        training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False}
        return prefer(kind, **{"name": "tiny-kto", "task": "kto", "training": training, **changes})

    return make


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def read(*rows, chat=True, **columns):
    data = Rows.from_list([{"id": f"train-{i}", **row} for i, row in enumerate(rows)])
    kept, left_out = unpaired_rows(data, Dataset("d.jsonl", **columns), chat)
    return [{k: v for k, v in row.items() if k != "id"} for row in kept], left_out


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "say good", "completion": "warm film", "label": True},
        {"prompt": "say good", "completion": "warm film", "label": 1},
        {"prompt": "say good", "completion": "warm film", "label": "True"},
        {"prompt": user("say good"), "completion": assistant("warm film"), "label": True},
    ],
)
def test_every_format_gives_the_same_example(row):
    expected = {"prompt": user("say good"), "completion": assistant("warm film"), "label": True}
    assert read(row)[0] == [expected]
    plain = {"prompt": "### Instruction:\nsay good\n\n### Response:\n", "completion": "warm film", "label": True}
    assert read(row, chat=False)[0] == [plain]


def test_a_pair_is_a_desirable_and_an_undesirable_answer_to_one_prompt():
    pair = {"prompt": "say good", "chosen": "warm film", "rejected": "cold film"}
    rows, _ = read(pair)
    assert sorted((row["label"], row["completion"][0]["content"]) for row in rows) == [
        (False, "cold film"), (True, "warm film")]  # fmt: skip
    assert {row["prompt"][0]["content"] for row in rows} == {"say good"}


def test_unusable_answers_are_counted_by_reason():
    good = {"prompt": "say good", "completion": "warm film", "label": True}
    _, left_out = read(good, {**good, "completion": " "}, {**good, "prompt": None}, {**good, "completion": None})
    assert left_out == {EMPTY: 2, NO_PROMPT: 1}


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"prompt": "a", "completon": "b", "label": True}, {}, "no column 'completion'. Did you mean 'completon'?"),
        ({"prompt": "a", "completion": "b", "label": 2}, {}, "row train-0, column 'label': expected true or false"),
        ({"prompt": "a", "completion": {"a": 1}, "label": True}, {}, "row train-0, column 'completion': expected text"),
        ({"prompt": "a", "completion": [{"a": "x"}], "label": True}, {}, "row train-0, column 'completion'.*'role"),
        ({"prompt": "a", "completion": "b", "label": True}, {"label": "good"}, "no column 'good'"),
    ],
)
def test_malformed_answers_say_where_and_what(row, columns, message):
    with pytest.raises(RecipeError, match=message):
        read(row, **columns)


def test_figures_are_means_over_prompts_of_pairs_or_of_right_signs():
    arguments = KTOConfig(output_dir="unused", beta=0.5, use_cpu=True, bf16=False, undesirable_weight=2.0)
    log_probs = np.array([-1.0, -3.0, -2.0, -4.0, -1.0, -1.0])
    predictions = np.stack([log_probs, log_probs, np.full(6, -2.0), log_probs - 1, [1, 0, 0, 1, 0, 1]], axis=1)
    examples = per_example(predictions, arguments)
    assert examples["reward"].tolist() == [0.5, -0.5, 0.0, -1.0, 0.5, 0.5]
    kl = 1.0  # the mean gain on the other examples' answers
    assert examples["loss"][0] == pytest.approx(1 - 1 / (1 + np.exp(-0.5 * (1 - kl))))
    assert examples["loss"][1] == pytest.approx(2 * (1 - 1 / (1 + np.exp(-0.5 * (kl + 1)))))
    figures = per_prompt(examples, [7, 7, 7, 8, 9, 7])
    # 7: desirable gains 1 and 1 against -1 and 0; 8: desirable, lost; 9: undesirable, gained.
    assert figures["preference_accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert figures["desirable_reward"][0] == 0.5 and np.isnan(figures["undesirable_reward"][1])


def test_other_answers_are_those_of_the_batch_rotated_by_one():
    assert _rotated([[1], [2], [3], [4], [5]], 2) == [[2], [1], [4], [3], [5]]


@pytest.mark.parametrize(
    ("kind", "training"),
    [("llama", {}), ("gpt2", {"loss_type": "apo_zero_unpaired", "undesirable_weight": 1.5}),
     ("llama", {"gradient_accumulation_steps": 2, "beta": 0.5})],
)  # fmt: skip
@pytest.mark.parametrize("arm", ["full"])
def test_each_step_has_the_loss_of_a_plain_trl_script(label, kind, training, arm, tmp_path):
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False, **training}
    recipe = label(kind, training=training)
    run = train(recipe, arm, output=tmp_path)
    task = task_of(recipe)
    ours = task.prepare()
    raw, _ = unpaired_rows(task.raw_splits()["train"], recipe.dataset, chat=kind == "llama")
    rows = {row["id"]: {k: row[k] for k in ("prompt", "completion", "label")} for row in raw}
    if kind == "gpt2":  # trl appends the end token as text, which a word-level tokenizer splits off
        rows = {i: {**row, "completion": row["completion"] + " <eos>"} for i, row in rows.items()}
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(recipe.model)
    config = KTOConfig(
        output_dir=str(tmp_path / "trl"), seed=0, learning_rate=1e-3, max_length=40, report_to="none",
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
        precompute_ref_log_probs=True, **training,
    )  # fmt: skip
    theirs = KTOTrainer(model=model, args=config, processing_class=ours.processor,
                        train_dataset=Rows.from_list([rows[i] for i in ours.ids["train"]]))  # fmt: skip
    keys = ["prompt_ids", "completion_ids", "label"] + ["KL_completion_ids"] * (kind == "llama")
    for mine, other in zip(ours.splits["train"], theirs.train_dataset, strict=True):
        assert all(mine[key] == other[key] for key in keys)
    theirs.train()
    losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert [loss for _, loss in run.data["training"]["losses"]] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_every_arm_learns_the_labels_and_starts_at_the_base(label, tmp_path, arm):
    run, base = (train(label(), name, output=tmp_path) for name in (arm, "base"))
    assert base.metrics["test"]["preference_accuracy"] == 0.5 and abs(base.metrics["test"]["margin"]) < 1e-5
    assert base.metrics["test"]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert run.metrics["test"]["preference_accuracy"] > 0.8 and run.metrics["test"]["margin"] > 0
    assert run.metrics["test"].keys() == {"preference_accuracy", "margin", "loss"}
    training = run.data["training"]
    assert training["examples"] == 128 and training["computed_tokens"] > training["tokens"]
    assert training["first_pass_seconds"] > 0 and training["losses"][0][1] == pytest.approx(0.5, abs=1e-3)
    assert run.data["checks"]["reload"] < 1e-6 and run.data["answers"][0]["prompt"] == "say good in a film"
    rows = pandas.read_parquet(run.folder / "predictions.parquet")
    assert rows["preference_accuracy"].mean() == pytest.approx(run.metrics["test"]["preference_accuracy"])
    assert rows["answers"].sum() == 32 and rows["id"].is_unique


def test_answers_are_truncated_at_their_end(label, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "say good", "completion": f"{word} " * (2 + 9 * (i % 2)), "label": i % 4 < 2}
            for i, word in enumerate(("day", "was", "it", "we", "so", "saw", "very", "and") * 2)]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    data = Dataset(str(path), train=10, validation=2, test=4)
    recipe = label(dataset=data, max_length=10, skip_checks=["duplicates"])
    prepared = task_of(recipe).prepare()
    assert any("training answers were truncated at 10 tokens" in note for note in prepared.notes)
    for split in prepared.splits.values():
        for row in split:
            lengths = [len(row["prompt_ids"]) + len(row[key]) for key in ("completion_ids", "KL_completion_ids")]
            assert max(lengths) <= 10 and row["length"] == lengths[0]
    with pytest.raises(RecipeError, match="--set max_length=6"):
        task_of(label(max_length=3)).prepare()


def test_kto_can_be_planned_and_tried(label):
    for name, arm in plan(label(), trial=True)["arms"].items():
        assert arm["steps"] == 16 and arm["memory"]["total"] > 0 and arm["trial"]["seconds_per_step"] > 0, name


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"loss_type": "ktoo"}, "Did you mean 'kto'"),
        ({"desirable_wieght": 2.0}, "Did you mean 'desirable_weight'"),
        ({"train_sampling_strategy": "random"}, "pairs each example with its neighbour"),
        ({"per_device_train_batch_size": 1}, "1 is too few for KTO"),
    ],
)
def test_unsupported_options_are_refused_before_anything_is_written(label, tmp_path, training, message):
    with pytest.raises(RecipeError, match=message):
        train(label(training={"use_cpu": True, **training}), "lora", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("task", ["kto", "grpo"])
def test_an_adaption_prompt_is_refused_from_the_table_and_in_a_recipe(label, task):
    rewarded = {"metric": "f1", "training": {"num_generations": 4}} if task == "grpo" else {}
    recipe = label(task=task, **rewarded)
    with pytest.raises(RecipeError, match="does not reach the model inside it"):
        choose_arms(recipe, ["adaption-prompt"])
    arm = Arm(AdaptionPromptConfig(adapter_len=4, adapter_layers=1))
    with pytest.raises(RecipeError, match="does not work with an adaption prompt"):
        task_of(recipe).check_arguments(arm, choose(recipe.training, None))


def test_answers_of_one_label_are_refused(label, tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "warm", "label": True}) + "\n"
                            for i in range(12)))  # fmt: skip
    with pytest.raises(RecipeError, match="all training answers are desirable"):
        task_of(label(dataset=Dataset(str(path), train=8, validation=2, test=2), arms={"full": Arm()})).prepare()


def test_arms_are_compared_by_prompt(label, tmp_path):
    data = compared_here(label(), ["full", "lora"], [0], tmp_path).data
    assert {arm["status"] for arm in data["arms"].values()} == {"ok"} and data["metric"] == "preference_accuracy"
    assert len(data["differences"]["lora"]["ci95"]) == 2
    assert data["base"]["metrics"]["test"]["preference_accuracy"] == 0.5


def test_a_merged_adapter_has_the_metrics_of_the_unmerged_one(label, tmp_path):
    run = train(label(), "lora", output=tmp_path)
    shown = CliRunner().invoke(app, ["merge", str(run.folder), "--output", str(tmp_path / "merged"), "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["before"]["preference_accuracy"] == run.metrics["test"]["preference_accuracy"]
    assert found["after"] == pytest.approx(found["before"], abs=1e-4)
