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


class FakeCuda:
    """torch.cuda of a GPU from before bf16."""

    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: "Tesla T4")
    is_bf16_supported = staticmethod(lambda including_emulation=True: including_emulation)


def test_a_gpu_without_bf16_computes_in_fp16(monkeypatch):
    monkeypatch.setattr(torch, "cuda", FakeCuda)
    chosen = device.choose({})
    assert (chosen.device, chosen.precision, chosen.autocast_dtype) == ("cuda", "fp16", torch.float16)
    assert chosen.training_arguments() == {"use_cpu": False, "bf16": False, "fp16": True}
    assert device.choose({"bf16": False}).precision == "fp32" and device.choose({"bf16": True}).precision == "bf16"
    assert device.choose({"use_cpu": True, "bf16": False}).precision == "fp32"


def test_the_precision_is_settled_once(monkeypatch, instruct, tmp_path):
    from peft_recipes.training.resolve import with_precision

    monkeypatch.setattr(device, "_bf16_pays", lambda device: False)
    recipe = instruct(training={"use_cpu": True})
    plain = with_precision(recipe, None).training
    assert plain["bf16"] is False and "fp16" not in plain
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cuda", FakeCuda)
        settled = with_precision(instruct(training={"use_cpu": False}), None)
    assert settled.training["fp16"] is True and settled.training["bf16"] is False
    settled.to_yaml(tmp_path / "recipe.yaml")
    assert with_precision(recipe, tmp_path).training["fp16"] is True  # as in the earlier call


class FakeMps:
    """torch.mps, whose allocator keeps what it once had."""

    def __init__(self):
        self.held, self.calls, self.state = 0, [], torch.tensor([1], dtype=torch.uint8)

    def synchronize(self):
        self.calls.append("synchronize")

    def empty_cache(self):
        self.held = 0

    def driver_allocated_memory(self):
        return self.held

    def get_rng_state(self):
        return self.state.clone()

    def set_rng_state(self, state):
        self.state = state


@pytest.fixture
def mps(monkeypatch):
    fake = FakeMps()
    monkeypatch.setattr(torch, "mps", fake)
    return fake


def test_mps_is_called_by_its_own_names(mps):
    from peft_recipes.measuring.memory import PeakMemory

    device.synchronise("mps")
    assert mps.calls == ["synchronize"]
    memory = PeakMemory("mps")
    assert memory.method == "driver_allocated_memory"
    mps.held = 500
    memory.release()
    memory.reset()
    mps.held = 300
    assert memory.read() == 300
    with device.random_state_kept("mps"):
        mps.state = torch.tensor([7], dtype=torch.uint8)
        torch.rand(1)
    assert mps.state.item() == 1


def test_a_checkpoint_on_mps_holds_its_random_state(mps, instruct, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from transformers import Trainer

    from peft_recipes.tasks.checkpoint_mixin import CheckpointMixin

    monkeypatch.setattr(Trainer, "_save_rng_state", lambda self, folder: None)
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda self, folder: None)
    trainer = CheckpointMixin.__new__(CheckpointMixin)
    trainer.args = SimpleNamespace(device=SimpleNamespace(type="mps"))
    trainer._save_rng_state(str(tmp_path))
    mps.state = torch.tensor([9], dtype=torch.uint8)
    trainer._load_rng_state(str(tmp_path))
    assert mps.state.item() == 1
    trainer._load_rng_state(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's own calls")
def test_the_cpu_needs_no_calls():
    device.synchronise("cpu")
    device.release_memory("cpu")
    assert device.random_state("cpu") is None
