"""Runs trained together on one base have the losses, weights and predictions of their own runs."""

from __future__ import annotations

import os
import signal

import pandas
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from peft_recipes import Arm, targets, train
from peft_recipes.kernels.joint_backbone import JointBackbone
from peft_recipes.runs.folder import read_run, run_folder
from peft_recipes.training import stages
from peft_recipes.training.lockstep import MeetingFailed
from peft_recipes.training.together import train_together


def lora(kind, rank, learning_rate=1e-2, group="all-linear", **options):
    return Arm(LoraConfig(r=rank, target_modules=targets(kind, group), **options), learning_rate=learning_rate)


def same(alone, together):
    """Assert that two runs have the same losses, metrics, predictions and weights, up to rounding."""
    one, two = alone.data, together.data
    assert together.ok, together.data["error"]
    assert not together.failed_checks
    losses = [[loss for _, loss in data["training"]["losses"]] for data in (one, two)]
    assert len(losses[0]) == one["training"]["steps"] > 3
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-5)
    for key in ("tokens", "computed_tokens", "examples", "padding_share", "batches"):
        assert one["training"][key] == two["training"][key], key
    assert one["signature"] == two["signature"]
    assert two["metrics"]["test"] == pytest.approx(one["metrics"]["test"], abs=1e-5)
    tables = [pandas.read_parquet(run.folder / "predictions.parquet") for run in (alone, together)]
    pandas.testing.assert_frame_equal(*tables, check_exact=False, rtol=1e-4, atol=1e-5)
    weights = [load_file(run.folder / "adapter_model.safetensors") for run in (alone, together)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-5)


@pytest.fixture
def passes(monkeypatch):
    """The number of runs in each joint forward pass."""
    counted, forward = [], JointBackbone._forward

    def count(self, owners, batches):
        counted.append(len(owners))
        return forward(self, owners, batches)

    monkeypatch.setattr(JointBackbone, "_forward", count)
    return counted


def compare_to_solo(recipe, jobs, output):
    alone = {job: train(recipe, job[0], seed=job[1], output=output / "alone") for job in jobs}
    together = train_together(recipe, jobs, output=output / "together")
    for job in jobs:
        assert not isinstance(together[job], BaseException), repr(together[job])
        same(alone[job], together[job])
    return together


def test_ranks_learning_rates_targets_and_seeds_train_together_as_alone(instruct, passes, tmp_path):
    arms = {
        "small": lora("llama", 2, 1e-2, "attention"),
        "large": lora("llama", 8, 3e-3, use_rslora=True),
        "mlp": lora("llama", 4, 2e-2, "mlp", use_dora=True),
    }
    recipe = instruct(arms={**instruct().arms, **arms})
    jobs = [("small", 0), ("small", 1), ("large", 0), ("mlp", 3)]
    together = compare_to_solo(recipe, jobs, tmp_path)
    assert together["small", 0].data["environment"]["shared_base"] == 4
    assert passes == [4] * together["small", 0].data["training"]["steps"]


@pytest.mark.parametrize("batches", ["padded", "shared-prefix"])
def test_gradient_accumulation_and_dropout(instruct, passes, tmp_path, batches):
    arms = {"one": lora("gpt2", 2, lora_dropout=0.2), "two": lora("gpt2", 4, 5e-3, "attention")}
    training = {**instruct().training, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    recipe = instruct("gpt2", arms={**instruct().arms, **arms}, training=training, batches=batches)
    together = compare_to_solo(recipe, [("one", 0), ("two", 0), ("two", 1)], tmp_path)
    assert together["one", 0].data["training"]["batches"].startswith(batches)
    assert passes == [3] * 11  # batches of 32 examples


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_classifiers_draw_their_heads_and_dropout_as_alone(classify, passes, tmp_path, kind):
    arms = {"one": lora(kind, 2, lora_dropout=0.1), "two": lora(kind, 4, 5e-3, "attention")}
    recipe = classify(kind, arms={**classify().arms, **arms}, training={**classify().training, "num_train_epochs": 1})
    together = compare_to_solo(recipe, [("one", 0), ("two", 0), ("two", 1)], tmp_path)
    assert set(passes) == {3}
    assert len({run.data["metrics"]["test"]["loss"] for run in together.values()}) == 3


def test_a_run_whose_loss_is_not_finite_leaves_the_others_as_they_are(instruct, passes, tmp_path):
    arms = {"good": lora("llama", 2), "bad": lora("llama", 2, 1e30)}
    recipe = instruct(arms={**instruct().arms, **arms})
    alone = train(recipe, "good", output=tmp_path / "alone")
    outcomes = train_together(recipe, [("good", 0), ("bad", 0)], output=tmp_path / "together")
    same(alone, outcomes["good", 0])
    assert isinstance(outcomes["bad", 0], FloatingPointError)
    assert read_run(run_folder(tmp_path / "together", recipe, "bad", 0)).data["status"] == "failed"
    assert 2 in passes and passes[-1] == 1


def test_an_interruption_keeps_a_checkpoint_of_every_run_and_they_go_on_together_or_alone(
    instruct, passes, tmp_path, monkeypatch
):
    arms = {"one": lora("llama", 2, lora_dropout=0.1), "two": lora("llama", 4, 5e-3)}
    recipe = instruct(arms={**instruct().arms, **arms}, training={**instruct().training, "num_train_epochs": 2})
    jobs, log_step = [("one", 0), ("two", 0), ("two", 1)], stages.log_step
    alone = {job: train(recipe, job[0], seed=job[1], output=tmp_path / "alone") for job in jobs}

    def interrupted(log, step, *rest):
        log_step(log, step, *rest)
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(stages, "log_step", log_step)

    monkeypatch.setattr(stages, "log_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_together(recipe, jobs, output=tmp_path / "together")
    steps = {
        job: sorted(p.name for p in run_folder(tmp_path / "together", recipe, *job).glob("trainer/checkpoint-*"))
        for job in jobs
    }
    assert all(len(found) == 1 for found in steps.values()), steps
    resumed = train_together(recipe, jobs[:2], output=tmp_path / "together", resume=True)
    resumed[jobs[2]] = train(recipe, *jobs[2][:1], seed=1, output=tmp_path / "together", resume=True)
    for job in jobs:
        assert resumed[job].data["training"]["resumed_at_steps"] in ([5], [6])
        same(alone[job], resumed[job])


@pytest.mark.parametrize("fault", ["another output", "an error"])
def test_a_joint_pass_that_is_not_exact_is_noticed_on_the_first_batch(instruct, tmp_path, monkeypatch, fault):
    forward = JointBackbone._forward

    def faulty(self, owners, batches):
        if fault == "an error":
            raise NotImplementedError("its layers take no rows")
        outputs = forward(self, owners, batches)
        if len(owners) == 2:  # the first pass: then one of them leaves
            with torch.no_grad():
                outputs[owners[0]].last_hidden_state.add_(0.1)
        return outputs

    recipe = instruct(arms={**instruct().arms, "one": lora("llama", 2, use_dora=True)})
    monkeypatch.setattr(JointBackbone, "_forward", faulty)
    together = compare_to_solo(recipe, [("one", 0), ("one", 1)], tmp_path)
    notes = [[note for note in run.data["notes"] if "by itself" in note] for run in together.values()]
    words = "its layers take no rows" if fault == "an error" else "the joint output for a first batch differs by"
    assert [bool(words in " ".join(each)) for each in notes] == [True, fault == "an error"]


def test_memory_that_all_lack_fails_no_run(instruct, tmp_path, monkeypatch):
    def lacking(*_):
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(JointBackbone, "_forward", lacking)
    recipe = instruct(arms={**instruct().arms, "one": lora("llama", 2)})
    outcomes = train_together(recipe, [("one", 0), ("one", 1)], output=tmp_path)
    assert all(isinstance(outcome, MeetingFailed) for outcome in outcomes.values())
    assert not list(tmp_path.rglob("run.json"))
    assert train(recipe, "one", output=tmp_path, resume=True).ok
