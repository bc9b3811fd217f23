"""Device, precision, threads: the recipe's options decide, then the measured speed of the machine."""

from __future__ import annotations

import pytest
import torch

from peft_recipes import train
from peft_recipes.hardware import device


@pytest.mark.parametrize(("speedup", "precision"), [(0.01, "fp32"), (2.5, "fp32"), (8.0, "bf16")])
def test_a_cpu_uses_bf16_only_if_a_trial_measures_it_much_faster(monkeypatch, speedup, precision):
    monkeypatch.setattr(device, "bf16_speedup", lambda: speedup)
    assert device.choose({"use_cpu": True}).precision == precision
    assert device.choose({"use_cpu": True, "bf16": False}).precision == "fp32"
    assert device.choose({"use_cpu": True, "bf16": True}).precision == "bf16"


def test_the_trial_measures_this_cpu():
    device.bf16_speedup.cache_clear()
    assert 0.001 < device.bf16_speedup() < 100


def test_the_recipe_sets_the_threads():
    before = torch.get_num_threads()
    try:
        assert device.choose({"use_cpu": True}, threads=1).threads == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_bf16_run_is_verified_in_fp32(classify, tmp_path):
    recipe = classify(training={**classify().training, "bf16": True})
    data = train(recipe, "lora", output=tmp_path).data
    assert data["environment"]["precision"] == "bf16"
    assert data["checks"]["reload"] < 1e-6
    assert data["checks"]["merge"] < 1e-5


def test_the_attention_implementation_of_the_recipe_is_used_and_recorded(instruct, tmp_path):
    data = train(instruct(attention="eager"), "lora", output=tmp_path).data
    assert data["environment"]["attention"] == "eager" and data["training"]["batches"] == "shared-prefix"
