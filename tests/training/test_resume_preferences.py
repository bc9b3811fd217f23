"""Runs of reward and kto that are interrupted resume with the same result, dropout included."""

from __future__ import annotations

import signal

import pytest
import torch
from distributed_runs import signal_at_step
from peft import LoraConfig
from safetensors.torch import load_file

from peft_recipes import Arm, train


@pytest.mark.parametrize("task", ["reward", "kto"])
def test_an_interrupted_run_resumes_with_the_same_result(prefer, tmp_path, task):
    arm = Arm(LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]), learning_rate=1e-2)
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False,
                "disable_dropout": False}  # fmt: skip
    recipe = prefer(name="tiny", task=task, arms={"lora": arm}, training=training)
    whole = train(recipe, "lora", output=tmp_path / "whole")
    signal_at_step(0, 6, signal.SIGINT)  # of 4 (reward) or 8 (kto) to an epoch
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "lora", output=tmp_path / "cut")
    again = train(recipe, "lora", output=tmp_path / "cut", resume=True)
    assert again.data["training"]["resumed_at_steps"] == [6]
    losses = [[loss for _, loss in run.data["training"]["losses"]] for run in (whole, again)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-6)
    ours, theirs = (load_file(run.folder / "adapter_model.safetensors") for run in (whole, again))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
