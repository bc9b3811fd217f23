"""Image classifiers with convolutions and BatchNorm: every arm trains, reloads, and leaves a frozen base as it was."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig
from pictures import pictures

from peft_recipes import Arm, Dataset, Recipe, train
from peft_recipes.arms.apply import apply_arm
from peft_recipes.guards import checks
from peft_recipes.tasks.registry import task_of

CONVOLUTION = ["convolution"]
ARMS = {
    "full": Arm(learning_rate=1e-3),
    "head": Arm("head", 1e-2),
    "bitfit": Arm("bitfit", 1e-2),
    "lora": Arm(LoraConfig(r=2, target_modules=CONVOLUTION), 1e-2),
    "ia3": Arm(IA3Config(target_modules=CONVOLUTION, feedforward_modules=[]), 1e-2),
    "norm": Arm(LoraConfig(r=2, target_modules=CONVOLUTION, modules_to_save=["normalization"]), 1e-2),
}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A recipe on a small random ResNet without a head, with every arm."""
    import transformers

    transformers.set_seed(0)
    folder = tmp_path_factory.mktemp("resnet")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    data = pictures(tmp_path_factory.mktemp("pictures"), train=11, test=4)
    return Recipe(
        name="pictures", task="image-classification", model=str(folder), arms=ARMS,
        dataset=Dataset(str(data), image="image", label="label", validation=4, test=8, test_split="test"),
        training={"max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no"},
    )  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_reloads_on_a_base_with_batch_norm(resnet, tmp_path, arm):
    run = train(resnet, arm, output=tmp_path)
    assert run.ok
    assert {"frozen", "reload"} <= set(run.data["checks"])


@pytest.mark.parametrize("arm", ARMS)
def test_running_statistics_move_where_they_are_trained_and_saved_alone(resnet, arm):
    task = task_of(resnet)
    base, new = task.load_base(task.prepare())
    model, _ = apply_arm(base, ARMS[arm], resnet.task, new, arm)
    before = {name: value.clone() for name, value in model.named_buffers()}
    frozen = checks.frozen_sums(model)
    model.train()(pixel_values=torch.randn(4, 3, 32, 32))
    moved = {name for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert bool(moved) == (arm in ("full", "norm"))
    assert arm == "full" or all("modules_to_save" in name for name in moved)
    checks.frozen_unchanged(frozen, model, arm)


def test_a_moved_statistic_of_a_frozen_base_is_found(resnet):
    task = task_of(resnet)
    base, new = task.load_base(task.prepare())
    model, _ = apply_arm(base, ARMS["lora"], resnet.task, new, "lora")
    before = checks.frozen_sums(model)
    next(b for n, b in model.named_buffers() if n.endswith("running_mean")).add_(1e-6)
    with pytest.raises(RuntimeError, match="should be frozen have changed"):
        checks.frozen_unchanged(before, model, "lora")


def test_pictures_in_train_and_test_are_removed_from_train(resnet):
    prepared = task_of(resnet).prepare()
    assert "2 examples that also occur in a later split were left out." in prepared.notes
    assert prepared.rows == {"train": 18, "validation": 4, "test": 8}
