"""Image classifiers with a head for other classes: a new head, convolutions of any kind, images of any size."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
import transformers
from card_code import code_in
from peft import IA3Config, LoraConfig
from pictures import pictures
from warm_python import warm

from peft_recipes import Arm, Dataset, Recipe, RecipeError, plan, targets, train
from peft_recipes.adapters.merge import merge_adapter
from peft_recipes.arms.apply import fit_targets
from peft_recipes.arms.selection import choose_arms
from peft_recipes.models import bases
from peft_recipes.models.architecture_table import head_modules
from peft_recipes.models.architecture_walk import walk
from peft_recipes.models.image_sizes import channels, height_and_width
from peft_recipes.models.module_matching import matched_modules
from peft_recipes.tasks.registry import task_of

POINTWISE = targets("efficientnet", "convolutions")
ARMS = {
    "full": Arm(learning_rate=1e-3),
    "head": Arm("head", 1e-2),
    "lora": Arm(LoraConfig(r=2, target_modules=POINTWISE), 1e-2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), train=11, test=4)


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory):
    """A small random EfficientNet with a head for five other classes."""
    transformers.set_seed(0)
    folder = tmp_path_factory.mktemp("efficientnet")
    config = transformers.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, hidden_act="relu6", num_block_repeats=[1, 1],
        in_channels=[32, 32], out_channels=[32, 48], strides=[1, 2], kernel_sizes=[3, 5], expand_ratios=[1, 6],
        image_size=32, num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.EfficientNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    model.save_pretrained(folder)
    transformers.EfficientNetImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(data):
    def make(folder, arms=ARMS, **changes) -> Recipe:
        splits = {"validation": 4, "test": 8, "test_split": "test"}
        return Recipe(
            name="pictures", task="image-classification", model=str(folder), arms=arms,
            dataset=Dataset(str(data), image="image", label="label", **splits, **changes),
            training={"max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True, "eval_strategy": "no"},
        )  # fmt: skip

    return make


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_reloads_and_merges_on_a_base_with_a_head_for_other_classes(recipe, efficientnet, tmp_path, arm):
    run = train(recipe(efficientnet, image_size=32), arm, output=tmp_path)
    checks = run.data["checks"]
    assert run.ok and checks["reload"] <= 1e-5
    assert run.data["parameters"]["head"] == 2 * 320 + 2
    if arm == "lora":
        assert checks["saved"] is True and checks["merge"] <= 1e-4
        assert merge_adapter(run.folder, tmp_path / "merged")["share_of_outputs"] <= 1e-4


def test_only_the_head_may_have_another_shape(recipe, efficientnet, tmp_path):
    task = task_of(recipe(efficientnet))
    _, new = task.load_base(task.prepare())
    assert new == ["classifier.bias", "classifier.weight"]
    config = json.loads((efficientnet / "config.json").read_text())
    for file in efficientnet.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_channels": 1}))
    with pytest.raises(RecipeError, match=r"1 weights have another shape, first efficientnet\.embeddings\.conv"):
        bases.load_model(recipe(tmp_path), transformers.AutoModelForImageClassification)


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    """A small random ConvNeXt, whose depthwise convolutions have 8 and 16 groups."""
    transformers.set_seed(0)
    folder = tmp_path_factory.mktemp("convnext")
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=32, layer_scale_init_value=1.0,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.ConvNextForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_lora_on_depthwise_convolutions_trains_and_reloads_at_a_rank_that_their_groups_divide(
    recipe, convnext, tmp_path
):
    arm = Arm(LoraConfig(r=16, target_modules=["dwconv"]), 1e-2)
    run = train(recipe(convnext, {"depthwise": arm}), "depthwise", output=tmp_path)
    assert run.data["parameters"]["adapter"] == sum(16 * c * 7 * 7 + 16 // c * c for c in (8, 16))
    assert run.data["checks"]["learning"] is True and run.data["checks"]["reload"] <= 1e-5
    assert run.data["checks"]["merge"] == "LORA can't be merged"  # PEFT merges no convolutions with groups


def test_a_rank_that_the_groups_of_a_convolution_do_not_divide_is_refused(recipe, convnext, efficientnet):
    arm = Arm(LoraConfig(r=2, target_modules=["dwconv"]), 1e-2)
    with pytest.raises(RecipeError, match=r"arm 'wide': PEFT can't put LORA on this model: .*group"):
        plan(recipe(convnext, {"wide": arm}))
    arm = Arm(LoraConfig(r=48, target_modules=["depthwise_conv.depthwise_conv"]), 1e-2)
    with pytest.raises(RecipeError, match=r"PEFT can't put LORA on this model: EfficientNetDepthwiseConv2d"):
        plan(recipe(efficientnet, {"own-class": arm}))


@pytest.mark.parametrize("method", [LoraConfig(r=2, target_modules="pointwise"), IA3Config(feedforward_modules=[])])
def test_a_model_that_reads_its_layers_attributes_is_refused_before_anything_is_trained(
    recipe, tmp_path, efficientnet, method
):
    """MobileNet computes its padding from the stride of its convolutions, which PEFT's layers don't have."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.1, num_labels=5, image_size=32)
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    method.target_modules = r".*(expand|reduce)_1x1\.convolution"
    shown = recipe(tmp_path, {"full": ARMS["full"], "adapter": Arm(method, 1e-2)})
    with pytest.raises(RecipeError, match=r"arm 'adapter': the model can't compute with \w+ on these layers .*stride"):
        plan(shown)
    with pytest.raises(RecipeError, match=r"arm 'adapter': the model can't compute"):
        train(shown, "adapter", output=tmp_path / "runs")


def test_methods_adapt_the_convolutions_of_a_base_without_linear_layers(recipe, efficientnet):
    chosen = choose_arms(recipe(efficientnet, {"full": ARMS["full"]}), ["all"])
    assert {"lora", "dora", "ia3", "loha", "lokr", "oft", "hira", "bitfit", "ln-tuning"} <= set(chosen.names)
    assert chosen.recipe.arms["dora"].peft.target_modules == set(POINTWISE)
    assert "it adapts no convolutions" in chosen.left_out["vera"] and "no convolutions" in chosen.left_out["pissa"]
    assert "it quantises linear layers" in chosen.left_out["qlora"]
    with pytest.raises(RecipeError, match="arm 'pissa': it adapts no convolutions"):
        choose_arms(recipe(efficientnet), ["pissa"])


@pytest.mark.parametrize(("momentum", "used"), [(0.99, 0.1), (0.01, 0.01)])
def test_a_momentum_in_tensorflows_convention_becomes_torchs_default(recipe, efficientnet, tmp_path, momentum, used):
    config = json.loads((efficientnet / "config.json").read_text()) | {"batch_norm_momentum": momentum}
    for file in efficientnet.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = bases.load_model(recipe(tmp_path), transformers.AutoModelForImageClassification)
    assert model.efficientnet.embeddings.batchnorm.momentum == used


def test_a_size_in_the_recipe_replaces_the_processors(recipe, efficientnet):
    for size, side in ((None, 64), (32, 32)):
        task = task_of(recipe(efficientnet, image_size=size))
        prepared = task.prepare()
        assert prepared.splits["train"][0]["pixel_values"].shape == (3, side, side)
        assert task.largest_batch(task.load_base(prepared)[0], None, 2)["pixel_values"].shape[-1] == 32
    with pytest.raises(RecipeError, match=r"dataset.image_size: expected a number of pixels above 0, got 0"):
        recipe(efficientnet, image_size=0)


def test_a_size_that_the_model_can_not_take_is_refused(recipe, tmp_path):
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=32, patch_size=8)  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert train(recipe(tmp_path), "head", output=tmp_path / "runs").ok
    with pytest.raises(RecipeError, match=r"dataset.image_size: model '.*' can't take images of 64 x 64 pixels"):
        train(recipe(tmp_path, image_size=64), "head", output=tmp_path / "other")


def test_convolutions_of_another_architecture_become_this_bases_layers(recipe, efficientnet):
    shown = recipe(efficientnet, {"lora": ARMS["lora"]})
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    vit = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    for config, group in ((resnet, "convolutions"), (vit, "all-linear")):
        fitted, notes = fit_targets(shown, config)
        names = targets(config, group)
        assert fitted.arms["lora"].peft.target_modules == (names if isinstance(names, str) else set(names))
        assert len(notes) == 1


def test_a_card_and_predict_use_the_size_and_the_head_of_the_run(recipe, efficientnet, tmp_path, monkeypatch):
    run = train(recipe(efficientnet, image_size=32), "lora", output=tmp_path)
    code = code_in((run.folder / "README.md").read_text())
    code = code.replace(code.split("base_id = ")[1].splitlines()[0], repr(str(efficientnet)))
    done = subprocess.run(
        warm("-c", f"{code}\nprint(inputs['pixel_values'].shape)"),
        cwd=run.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] in ("dark", "light") and "[1, 3, 32, 32]" in done.stdout


TIMM = {
    "architecture": "resnet10t", "num_classes": 1000,
    "pretrained_cfg": {"input_size": [3, 64, 64], "classifier": "fc", "mean": [0.5] * 3, "std": [0.5] * 3},
}  # fmt: skip


def test_a_timm_model_without_timm_says_what_to_install(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.models.timm_wrapper.configuration_timm_wrapper.requires_backends", missing)
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    with pytest.raises(
        RecipeError, match=r"is a model of timm: pip install timm torchvision .*transformers\.$"
    ) as told:
        bases.load_config(recipe(tmp_path))
    assert len(told.value.problems) == 1 and "\n" not in str(told.value)


def missing(*_):
    raise ImportError("TimmWrapperConfig requires the timm library but it was not found in your environment.")


class TimmModel(torch.nn.Module):
    """As timm.create_model makes them: blocks in a Sequential, the head's name in `pretrained_cfg`."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2)))
        self.head = torch.nn.Sequential()
        self.head.add_module("fc", torch.nn.Linear(4, 2))
        self.pretrained_cfg = {"classifier": "head.fc", "input_size": (3, 48, 64)}


class Wrapper(transformers.PreTrainedModel):
    base_model_prefix = "timm_model"

    def __init__(self):
        config = transformers.PretrainedConfig()
        config.model_type, config.pretrained_cfg = "timm_wrapper", {"input_size": (3, 48, 64)}
        super().__init__(config)
        self.timm_model = TimmModel()


def test_the_head_the_blocks_and_the_image_size_of_a_timm_model_are_found():
    model = Wrapper()
    assert head_modules(model) == ["timm_model.head.fc"]
    assert matched_modules(model, walk(model).group("all-linear")) == ["timm_model.blocks.0.0", "timm_model.blocks.1.0"]
    assert (channels(model.config), height_and_width(model.config)) == (3, (48, 64))
