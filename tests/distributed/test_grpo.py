"""Two ranks draw answers of their own, so only what does not depend on them is that of one process."""

from __future__ import annotations

import json
import math

from peft import LoraConfig
from small import FILLER, GOOD
from two_ranks import launch, run_of

from peft_recipes import Arm, Dataset, Recipe, targets


def test_two_ranks_learn_from_the_answers_that_each_draws(tiny, tmp_path):
    rows = [{"prompt": f"say {GOOD[i % 8]} in {FILLER[i % 14]}", "completion": GOOD[i % 8]} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    recipe = Recipe(
        name="grpo", task="grpo", model=str(tiny("llama")), metric="f1", max_length=24, threads=1,
        dataset=Dataset(str(tmp_path / "prompts.jsonl"), train=24, validation=5, test=11), skip_checks=["duplicates"],
        training={"num_train_epochs": 2, "per_device_train_batch_size": 16, "num_generations": 4, "use_cpu": True,
                  "bf16": False, "max_completion_length": 6},
        arms={"lora": Arm(LoraConfig(r=4, target_modules=targets("llama", "attention")), learning_rate=2e-2)},
    )  # fmt: skip
    recipe.to_yaml(tmp_path / "grpo.yaml")
    launch(tmp_path, "two", "ddp", [[str(tmp_path / "grpo.yaml"), "lora", str(tmp_path / "two"), {}]])
    run = run_of(tmp_path, "two", recipe, "lora")
    assert run is not None and run.ok and run.data["checks"]["reload"] < 1e-6
    training = run.data["training"]
    assert training["steps"] == 12 and training["examples"] == 12 * 16  # of both ranks, as of one process
    assert all(math.isfinite(loss) for _, loss in training["losses"])
    assert [point["step"] for point in training["validation"]] == [6, 12]
    assert run.metrics["test"]["reward"] == run.metrics["test"]["f1"]
