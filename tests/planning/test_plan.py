"""Plans: exact parameter counts from configurations alone, steps, memory and trials."""

from __future__ import annotations

import json

import pytest
from transformers import DistilBertConfig, GPT2Config, LlamaConfig

from peft_recipes import load_recipe, plan
from peft_recipes.hardware import environment
from peft_recipes.planning import memory as planned

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True}  # fmt: skip


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Make the data unreachable: a plan still has everything but the number of steps."""
    from peft_recipes.data import sources
    from peft_recipes.errors import RecipeError

    def refuse(*_):
        raise RecipeError("not here")

    monkeypatch.setattr(sources, "load_splits", refuse)


def planned_with(name, config, tmp_path):
    config.save_pretrained(tmp_path / "base")
    return plan(load_recipe(name, changes=[f"model={tmp_path / 'base'}"]))


@pytest.fixture
def by_rule(monkeypatch):
    """No simulated steps, which take most of the time of a plan: for counts alone."""
    monkeypatch.setattr(planned, "arm_step_memory", cannot)


def cannot(*_):
    raise RuntimeError("no meta kernel")


@pytest.mark.usefixtures("by_rule")
def test_smollm2(tmp_path):
    arms = planned_with("smollm2-alpaca", LlamaConfig(**SMOLLM2), tmp_path)["arms"]
    assert (arms["lora"]["trainable_parameters"], arms["lora"]["total_parameters"]) == (1_843_200, 134_515_008)
    assert arms["full"]["trainable_parameters"] == 134_515_008
    assert len(arms["lora"]["modules"]) == 4 * 30 and len(arms["lora-all"]["modules"]) == 7 * 30


@pytest.mark.usefixtures("by_rule")
def test_distilbert(tmp_path):
    lora = planned_with("distilbert-imdb", DistilBertConfig(), tmp_path)["arms"]["lora"]
    assert (lora["adapter_parameters"], lora["head_parameters"]) == (589_824, 592_130)
    assert lora["total_parameters"] == 66_955_010


@pytest.mark.usefixtures("by_rule")
def test_gpt2(tmp_path):
    arms = planned_with("gpt2-sms-spam", GPT2Config(), tmp_path)["arms"]
    assert arms["lora"]["adapter_parameters"] == 2_359_296
    assert arms["head"]["trainable_parameters"] == 2 * 768


def test_the_small_cnn():
    arms = plan(load_recipe("mnist-shift"))["arms"]
    trainable = {name: arm["trainable_parameters"] for name, arm in arms.items()}
    assert trainable["full"] == arms["lora"]["total_parameters"] == 421_642
    assert (trainable["head"], trainable["lora"], trainable["lora-r2"]) == (1_290, 27_216, 6_804)
    assert arms["lora-conv"]["modules"] == ["conv1", "conv2", "fc1", "classifier"]


def test_without_the_data_the_steps_are_unknown_and_a_note_says_why(tmp_path):
    made = planned_with("smollm2-alpaca", LlamaConfig(**{**SMOLLM2, "num_hidden_layers": 2}), tmp_path)
    assert all(arm["steps"] is None for arm in made["arms"].values())
    assert any("number of steps" in note for note in made["notes"])
    json.dumps(made)


def test_steps_follow_from_rows_batch_accumulation_and_epochs():
    from peft_recipes.planning.plan import steps

    recipe = load_recipe("gpt2-sms-spam")
    assert steps(recipe, {"train": 1045}) == 131 * 5
    recipe = load_recipe("gpt2-sms-spam", changes=["training.gradient_accumulation_steps=4"])
    assert steps(recipe, {"train": 1045}) == 33 * 5


def test_an_architecture_without_a_row_is_planned_with_a_note(tmp_path):
    from transformers import Olmo2Config

    config = Olmo2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    made = planned_with("smollm2-alpaca", config, tmp_path)
    assert len(made["arms"]["lora"]["modules"]) == 8
    assert any("olmo2" in note for note in made["notes"])


def test_an_arm_that_does_not_fit_is_refused_with_what_would_help(instruct, tmp_path, monkeypatch):
    from peft_recipes import RecipeError, compare, train

    monkeypatch.undo()  # the data is needed here
    monkeypatch.setattr(environment, "device_memory_bytes", lambda _: 10**6)
    for start in (
        lambda: train(instruct(), "full", output=tmp_path / "o"),
        lambda: compare(instruct(), output=tmp_path / "o"),
    ):
        with pytest.raises(RecipeError, match=r"needs about .* this machine has 0.0 GB") as refused:
            start()
        assert "skip_checks=[memory]" in str(refused.value) and "per_device_train_batch_size=4" in str(refused.value)
    assert not (tmp_path / "o").exists()
    run = train(instruct(skip_checks=["memory"]), "full", output=tmp_path / "o")
    assert run.ok


def test_gradient_checkpointing_is_counted_where_a_step_only_fits_with_it(tmp_path, monkeypatch):
    from peft_recipes.planning import step_memory

    monkeypatch.setattr(
        step_memory, "loaded_libraries_bytes", lambda: 0
    )  # this process's memory grows from test to test
    LlamaConfig(**{**SMOLLM2, "num_hidden_layers": 8, "vocab_size": 8_192}).save_pretrained(tmp_path / "base")
    recipe = load_recipe("smollm2-alpaca", changes=[f"model={tmp_path / 'base'}"])
    without = plan(recipe, ["lora"])["arms"]["lora"]["memory"]
    assert not without["gradient_checkpointing"]
    limit = without["total"] - without["activations"] // 3
    monkeypatch.setattr(environment, "device_memory_bytes", lambda _: limit)
    with_it = plan(recipe, ["lora"])["arms"]["lora"]["memory"]
    assert with_it["gradient_checkpointing"] and with_it["fits"]
    assert with_it["activations"] < without["activations"] / 2


@pytest.mark.parametrize("kind", ["classify", "instruct"])
def test_a_trial_estimates_the_time_of_a_run(request, kind, monkeypatch):
    monkeypatch.undo()
    recipe = request.getfixturevalue(kind)()
    arms = plan(recipe, trial=True)["arms"]
    for arm in arms.values():
        found = arm["trial"]
        assert found["seconds_per_step"] > 0 and found["tokens_per_second"] > 0
        assert found["estimated_seconds"] >= found["seconds_per_step"] * arm["steps"]
        assert arm["tokens"] > 0


def test_a_step_that_cannot_be_simulated_is_bounded_by_rule(instruct, monkeypatch):

    monkeypatch.undo()
    recipe = instruct()
    played = plan(recipe, ["full"])["arms"]["full"]["memory"]
    assert played["played"]

    monkeypatch.setattr(planned, "arm_step_memory", cannot)
    full = plan(recipe, ["full"])["arms"]["full"]
    ruled = full["memory"]
    assert not ruled["played"]
    # Apart from buffers, which only a simulated step has.
    assert ruled["weights"] == 4 * full["total_parameters"] and 0 <= played["weights"] - ruled["weights"] < 1_000
    assert ruled["activations"] >= played["activations"]
