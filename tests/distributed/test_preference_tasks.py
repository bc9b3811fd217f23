"""Two ranks train reward models and on labelled answers what one process trains, to 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig
from two_ranks import assert_same, launch, run_of

from peft_recipes import Arm, Dataset, Recipe, targets, train

RUNS = [("reward", "lora"), ("kto", "lora"), ("kto", "full")]


@pytest.fixture(scope="module")
def recipes(tiny, preferences):
    """A recipe for each task, with indivisible evaluation splits; kto's steps divide, reward's don't."""
    lora = LoraConfig(r=4, target_modules=targets("llama", "attention"))
    reward = Recipe(
        name="reward", task="reward", model=str(tiny("llama")), max_length=40,
        dataset=Dataset(str(preferences), train=33, validation=5, test=7),
        # epsilon: with AdamW's default, 1e-8, a gradient of rounding errors alone makes a full step.
        training={"num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 2,
                  "use_cpu": True, "bf16": False, "adam_epsilon": 1e-4},
        arms={"full": Arm(learning_rate=1e-3), "lora": Arm(lora, learning_rate=1e-2)},
        checkpoint_seconds=300, threads=1,
    )  # fmt: skip
    kto = {"name": "kto", "task": "kto", "dataset": Dataset(str(preferences), train=32, validation=5, test=7)}
    return {"reward": reward, "kto": Recipe(**{**vars(reward), **kto, "metric": None})}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, recipes, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    for name, recipe in recipes.items():
        recipe.to_yaml(root / f"{name}.yaml")
    launch(root, request.param, request.param, [[str(root / f"{n}.yaml"), a, str(root / "two"), {}] for n, a in RUNS])
    return root


@pytest.fixture(scope="module")
def one(recipes, tmp_path_factory):
    root: Path = tmp_path_factory.mktemp("one")
    return {(name, arm): train(recipes[name], arm, output=root) for name, arm in RUNS}


@pytest.mark.parametrize(("name", "arm"), RUNS)
def test_two_ranks_train_what_one_process_does(one, two, recipes, name, arm):
    run = run_of(two, "two", recipes[name], arm)
    assert run is not None and run.ok
    assert_same(one[name, arm], run)
    for split, metrics in one[name, arm].metrics.items():
        assert run.metrics[split] == pytest.approx(metrics, abs=1e-5), split
