"""grpo: prompts and rewards that name what is wrong, losses as in trl, figures from greedy answers, exact resume."""

from __future__ import annotations

import json

import pandas
import pytest
import torch
import transformers
from datasets import Dataset as Rows
from distributed_runs import signal_at_step
from rows import prompt_rows
from safetensors.torch import load_file
from small import FILLER, GOOD, compared_here
from trl import GRPOConfig, GRPOTrainer

from peft_recipes import Arm, Dataset, RecipeError, scan, train
from peft_recipes.data.preferences import NO_PROMPT
from peft_recipes.data.prompts import NO_REFERENCE, prompt_notes
from peft_recipes.planning.plan import plan
from peft_recipes.tasks.registry import task_of


def goodness(prediction: str, row: dict) -> float:
    """The share of the answer's words that are good ones; more for the reference."""
    words = prediction.split()
    assert row["prompt"].startswith("say")
    return sum(word in GOOD for word in words) / max(len(words), 1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A jsonl of 48 prompts with a word as reference, and the file of a reward function."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"say {GOOD[i % 8]} in {FILLER[i % 14]} film {FILLER[i % 5]}", "completion": GOOD[i % 8]}
            for i in range(48)]  # fmt: skip
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (folder / "rewards.py").write_text(
        f"GOOD = {GOOD!r}\n\n\ndef goodness(prediction, row):\n    assert row['prompt'].startswith('say')\n"
        "    words = prediction.split()\n    return sum(word in GOOD for word in words) / max(len(words), 1)\n"
    )
    return folder


@pytest.fixture
def answer(prefer, prompts):
    """answer(kind) -> a grpo recipe that runs in a few seconds: tiny Llama, 48 prompts, arms full and lora."""

    def make(kind="llama", **changes):
        training = {"num_train_epochs": 3, "per_device_train_batch_size": 16, "num_generations": 4, "use_cpu": True,
                    "bf16": False, "max_completion_length": 6, "eval_strategy": "no"}  # fmt: skip
        options = {"name": "tiny-grpo", "task": "grpo", "training": training, "max_length": 24,
                   "dataset": Dataset(str(prompts / "prompts.jsonl"), train=32, validation=8, test=8),
                   "skip_checks": ["duplicates"], "reward": f"{prompts / 'rewards.py'}:goodness"}  # fmt: skip
        return prefer(kind, **{**options, **changes})

    return make


def read(*rows, chat=True, references=True, **columns):
    data = Rows.from_list([{"id": f"train-{i}", **row} for i, row in enumerate(rows)])
    kept, left_out = prompt_rows(data, Dataset("d.jsonl", **columns), chat, references)
    return list(kept), left_out


def test_prompts_have_a_reference_and_all_columns_of_their_row():
    rows, left_out = read({"prompt": "say good", "completion": 12, "level": 3}, {"prompt": " ", "completion": 1},
                          {"prompt": "say", "completion": None})  # fmt: skip
    (row,) = rows
    assert row["prompt"] == [{"role": "user", "content": "say good"}] and row["reference"] == "12"
    assert json.loads(row["row"]) == {"prompt": "say good", "completion": 12, "level": 3}
    assert left_out == {NO_PROMPT: 1, NO_REFERENCE: 1}
    (plain,), _ = read({"prompt": [{"role": "user", "content": "say good"}]}, chat=False, references=False)
    assert plain["prompt"] == "### Instruction:\nsay good\n\n### Response:\n" and plain["reference"] == ""


def test_a_system_message_and_a_context_are_shown_with_the_prompt():
    (row,), _ = read({"prompt": "say", "completion": "1", "system": "Be brief.", "context": "A text.", "level": 3})
    assert [message["content"] for message in row["prompt"]] == ["Be brief.", "say\n\nA text."]
    assert prompt_notes(["id", "prompt", "completion", "system", "level"], Dataset("d.jsonl")) == [
        "Shown with the prompt: system.",
        "Columns that only the reward gets: level.",
    ]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"promt": "a", "completion": "b"}, {}, "no column 'prompt'. Did you mean 'promt'"),
        ({"prompt": "a"}, {}, "no column 'completion'"),
        ({"prompt": {"a": 1}, "completion": "b"}, {}, "row train-0, column 'prompt': expected text"),
        ({"prompt": [{"role": "x"}], "completion": "b"}, {}, "row train-0, column 'prompt'.*'content"),
    ],
)
def test_malformed_prompts_say_where_and_what(row, columns, message):
    with pytest.raises(RecipeError, match=message):
        read(row, **columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "grpo needs one: reward: 'module:function', or as metric .*exact_match"),
        ({"reward": "nothing"}, "reward: expected 'module:function'"),
        ({"reward": None, "metric": "exact_mach"}, "Did you mean 'exact_match'"),
        ({"training": {"num_generation": 4}}, "Did you mean 'num_generations'"),
        ({"training": {"use_vllm": True}}, "generated by transformers, not by vLLM"),
        ({"training": {"reward_weights": [1.0]}}, "there is one reward"),
        ({"task": "sft", "training": {}}, "reward: no effect: it is for the task grpo"),
    ],
)
def test_wrong_options_are_refused_with_the_nearest_name(answer, changes, message):
    with pytest.raises(RecipeError, match=message):
        answer(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "rewards_nowhere:goodness"}, "rewards_nowhere can't be imported"),
        ({"reward": "json:lods"}, "json has no function 'lods'. Did you mean 'loads'"),
        ({"training": {"num_generations": 3, "use_cpu": True}}, "num_generations: 3 answers to each prompt do"),
        ({"max_length": 8}, "No train prompt has 2 tokens or less"),
        ({"metric": "number", "reward": None}, "references can't be compared with"),
        ({"training": {"per_device_train_batch_size": 80, "num_generations": 2}}, "32 training prompts"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_before_anything_is_written(answer, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        train(answer(**changes), "lora", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("training", [{}, {"beta": 0.1, "gradient_accumulation_steps": 2, "num_iterations": 2}])
def test_each_step_has_the_loss_of_a_plain_trl_script(answer, training, tmp_path):
    recipe = answer()
    recipe = recipe.with_changes({"training": {**training, "max_steps": 6}})
    run = train(recipe, "full", output=tmp_path)
    prepared = task_of(recipe).prepare()
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(recipe.model)
    config = GRPOConfig(
        output_dir=str(tmp_path / "trl"), seed=0, learning_rate=1e-3, report_to="none", gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", disable_tqdm=True, **recipe.training,
    )  # fmt: skip

    def reward(completions, **_):
        return [goodness(text[0]["content"].strip(), {"prompt": "say"}) for text in completions]

    theirs = GRPOTrainer(model=model, reward_funcs=reward, args=config, processing_class=prepared.processor,
                         train_dataset=prepared.splits["train"])  # fmt: skip
    theirs.train()
    losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert len(losses) == 6 and any(abs(loss) > 1e-6 for loss in losses)
    assert [loss for _, loss in run.data["training"]["losses"]] == pytest.approx(losses, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("arm", ["full", "lora"])
def test_every_arm_is_rewarded_more_than_the_base(answer, tmp_path, arm):
    run, base = (train(answer(), name, output=tmp_path) for name in (arm, "base"))
    assert run.metrics["test"]["reward"] > base.metrics["test"]["reward"] + 0.3
    assert run.metrics["test"].keys() == {"reward", "ended", "answer_tokens", "empty_answers"}
    training = run.data["training"]
    assert training["steps"] == 24 and training["examples"] == 24 * 16 and training["tokens"] > 24 * 16 * 5
    assert run.data["checks"]["reload"] < 1e-6 and run.data["answers"][0]["prompt"] == "say good in a film"
    rows = pandas.read_parquet(run.folder / "predictions.parquet")
    assert rows["reward"].mean() == pytest.approx(run.metrics["test"]["reward"])
    for row in rows.itertuples():
        assert row.reward == pytest.approx(goodness(row.answer, {"prompt": "say"})) and row.reference in GOOD


def test_the_metric_is_the_reward_where_no_function_is_named(answer, tmp_path):
    recipe = answer(reward=None, metric="contains")
    run = train(recipe.with_changes({"training": {"max_steps": 2}}), "full", output=tmp_path)
    assert run.metrics["test"]["reward"] == run.metrics["test"]["contains"]
    assert run.data["training"]["examples"] == 32


def test_a_metric_is_reported_beside_the_reward(answer, tmp_path):
    recipe = answer(metric="f1").with_changes({"training": {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}})
    run = train(recipe, "lora", output=tmp_path)
    assert {"reward", "f1"} <= run.metrics["test"].keys()
    points = run.data["training"]["validation"]
    assert [point["step"] for point in points] == [1, 2] and all("reward" in point for point in points)


def test_an_interrupted_run_resumes_with_the_same_answers(answer, tmp_path):
    import signal

    recipe = answer(checkpoint_seconds=300)
    whole = train(recipe, "lora", output=tmp_path / "whole")
    signal_at_step(0, 10, signal.SIGINT)  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "lora", output=tmp_path / "cut")
    resumed = train(recipe, "lora", output=tmp_path / "cut", resume=True)
    assert resumed.data["training"]["resumed_at_steps"] == [10]
    losses = [[loss for _, loss in run.data["training"]["losses"]] for run in (whole, resumed)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-6)
    assert resumed.metrics["test"] == pytest.approx(whole.metrics["test"])
    ours, theirs = (load_file(run.folder / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_grpo_can_be_planned_and_tried(answer):
    for name, arm in plan(answer(), trial=True)["arms"].items():
        assert arm["steps"] == 24 and arm["memory"]["total"] > 0 and arm["trial"]["seconds_per_step"] > 0, name


def test_a_reference_on_a_base_that_the_adapter_changes_is_refused(answer, tmp_path):
    from peft import LoraConfig

    pissa = Arm(LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]), learning_rate=1e-3)
    recipe = answer(arms={"pissa": pissa}).with_changes({"training": {"beta": 0.1}})
    with pytest.raises(RecipeError, match="pissa changes the base"):
        train(recipe, "pissa", output=tmp_path)


def test_arms_are_compared_by_their_rewards(answer, tmp_path):
    data = compared_here(answer(), ["full", "lora"], [0], tmp_path).data
    assert {arm["status"] for arm in data["arms"].values()} == {"ok"} and data["metric"] == "reward"
    difference = data["differences"]["lora"]
    assert difference["margin"] == pytest.approx(0.01 * data["arms"]["full"]["metric"]["mean"])
    assert data["base"]["metrics"]["test"]["reward"] < data["arms"]["lora"]["metric"]["mean"]
    assert "reward" in (tmp_path / "tiny-grpo" / "comparison.md").read_text()


def test_a_scan_says_why_it_cannot_choose(answer, tmp_path):
    with pytest.raises(RecipeError, match="chooses by the validation loss, which grpo has none of"):
        scan(answer(), output=tmp_path)


def test_the_embedded_problems_serve_as_prompts(answer):
    recipe = answer(reward=None, metric="number", max_length=200,
                    dataset=Dataset("embedded:arithmetic", prompt="question", completion="answer", train=16,
                                    validation=4, test=4))  # fmt: skip
    prepared = task_of(recipe).prepare()
    assert len(prepared.prompts["test"]) == 4 and all(row["reference"] for row in prepared.prompts["test"])
