"""Device, precision, threads: what the recipe says decides, then what the machine is fast at."""

from __future__ import annotations

import pytest
import torch

from peft_recipes import train
from peft_recipes.hardware import device


@pytest.mark.parametrize(("speedup", "precision"), [(0.01, "fp32"), (2.5, "fp32"), (8.0, "bf16")])
def test_a_cpu_computes_in_bf16_only_where_a_trial_found_it_much_faster(monkeypatch, speedup, precision):
    monkeypatch.setattr(device, "bf16_speedup", lambda: speedup)
    assert device.choose({"use_cpu": True}).precision == precision
    assert device.choose({"use_cpu": True, "bf16": False}).precision == "fp32"
    assert device.choose({"use_cpu": True, "bf16": True}).precision == "bf16"


def test_the_trial_gives_a_figure_of_this_cpu():
    device.bf16_speedup.cache_clear()
    assert 0.001 < device.bf16_speedup() < 100


def test_threads_are_the_recipes(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert device.choose({"use_cpu": True}, threads=1).threads == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_run_in_bf16_is_verified_in_the_precision_of_its_weights(classify, tmp_path):
    recipe = classify(training={**classify().training, "bf16": True})
    data = train(recipe, "lora", output=tmp_path).data
    assert data["environment"]["precision"] == "bf16"
    assert data["checks"]["reload"] < 1e-6
    assert data["checks"]["merge"] < 1e-5


def test_attention_is_the_one_asked_for_and_stands_in_the_evidence(instruct, tmp_path):
    data = train(instruct(attention="eager"), "lora", output=tmp_path).data
    assert data["environment"]["attention"] == "eager" and data["training"]["batches"] == "shared-prefix"
