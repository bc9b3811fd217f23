"""What only a CUDA GPU shows: autocast, the allocator's peak, quantised bases, out of memory, torch.compile, NCCL."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from peft_recipes import Arm, compare, train
from peft_recipes.distributed.launch import launch_files

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
ON_GPU = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "bf16": True}


def losses(data: dict) -> list[float]:
    return [loss for _, loss in data["training"]["losses"]]


def test_losses_in_bf16_are_those_in_fp32_on_the_cpu(instruct, tmp_path):
    on_gpu = train(instruct(training=ON_GPU), "lora", output=tmp_path / "gpu").data
    on_cpu = train(instruct(), "lora", output=tmp_path / "cpu").data
    assert (on_gpu["environment"]["device"], on_gpu["environment"]["precision"]) == ("cuda", "bf16")
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=2e-2)
    assert on_gpu["training"]["tokens"] == on_cpu["training"]["tokens"]


def test_the_peak_is_the_allocators_and_holds_the_weights_and_the_optimizer(instruct, tmp_path):
    data = train(instruct(training=ON_GPU), "full", output=tmp_path).data
    assert data["training"]["peak_memory_method"] == "max_memory_allocated"
    assert 4 * 4 * data["parameters"]["total"] < data["training"]["peak_memory_bytes"] < 10**9


def test_an_adapter_on_a_quantised_base_trains_and_passes_its_checks(instruct, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    lora = copy.deepcopy(instruct().arms["lora"])
    lora.quantise = "nf4"
    recipe = instruct(model=str(tiny("llama", 64)), arms={"full": Arm(learning_rate=1e-3), "qlora": lora},
                      training=ON_GPU)  # fmt: skip
    data = train(recipe, "qlora", output=tmp_path).data
    assert losses(data)[-1] < losses(data)[0] and data["status"] == "ok"


def test_an_arm_beyond_the_gpus_memory_is_a_row_and_the_others_continue(instruct, tmp_path):
    """Held memory leaves 3 GB; the arm's adapter takes 7."""
    import torch

    arms = {"huge": copy.deepcopy(instruct().arms["lora"]), "lora": instruct().arms["lora"]}
    arms["huge"].method.r = 4_000_000
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(free - 3 * 2**30, 1), dtype=torch.uint8, device="cuda")
    made = compare(instruct(arms=arms, training=ON_GPU, skip_checks=["memory"]), output=tmp_path)
    del held
    assert {name: arm["status"] for name, arm in made.data["arms"].items()} == {"huge": "out-of-memory", "lora": "ok"}
    assert "CUDA out of memory" in made.data["arms"]["huge"]["error"]


def test_a_compiled_model_has_the_losses_of_one_that_is_not(instruct, tmp_path):
    plain = train(instruct(training=ON_GPU), "lora", output=tmp_path / "plain").data
    compiled = train(instruct(training={**ON_GPU, "torch_compile": True}), "lora", output=tmp_path / "compiled").data
    assert losses(compiled) == pytest.approx(losses(plain), rel=2e-2)


def test_one_process_under_accelerate_launch_runs_on_nccl(instruct, tmp_path):
    recipe, said = instruct(training=ON_GPU), tmp_path / "backend.json"
    recipe.to_yaml(tmp_path / "mine.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_files()["ddp"]),
               "--num_processes", "1", "--main_process_port", "0", "-m", "gpu.launched",
               str(tmp_path / "mine.yaml"), "--arm", "lora", "--output", str(tmp_path)]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "PEFT_RECIPES_BACKEND_FILE": str(said)}
    done = subprocess.run(command, env=env, cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(said.read_text()) == {"backend": "nccl", "world_size": 1}
    alone = train(recipe, "lora", output=tmp_path / "alone").data
    launched = json.loads((tmp_path / recipe.name / "lora" / "seed-0" / "run.json").read_text())
    assert losses(launched) == pytest.approx(losses(alone), rel=1e-3)


def test_rank_stabilised_lora_merges_in_bf16(instruct, tmp_path):
    arm = Arm(LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "v_proj"]), learning_rate=1e-2)
    data = train(instruct(arms={"full": Arm(), "rslora": arm}, training=ON_GPU), "rslora", output=tmp_path).data
    assert data["status"] == "ok"
