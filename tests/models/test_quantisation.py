"""Quantised bases: which layers are quantised, and adapters on them saved, reloaded and merged."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from small import compared_here
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from peft_recipes import Arm, RecipeError, train
from peft_recipes.adapters.check import check_adapter
from peft_recipes.cli.app import app
from peft_recipes.models.bases import load_config
from peft_recipes.models.meta import meta_model
from peft_recipes.models.quantisation import TOLERANCE, dequantised, disable_bf16_kernels, quantised_weights
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.tasks.registry import task_of

ARMS = {"nf4": "qlora", "int8": "lora-int8"}


@pytest.fixture
def classify(classify, tiny):
    """With bases wide enough for NF4's blocks of 64 weights."""
    return lambda kind="distilbert", **changes: classify(kind, **{"model": str(tiny(kind, 64)), **changes})


@pytest.fixture
def instruct(instruct, tiny):
    return lambda kind="llama", **changes: instruct(kind, **{"model": str(tiny(kind, 64)), **changes})


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture
def run(instruct, classify, shared):
    """run(kind, arm) -> a run on a tiny Llama (sft) or GPT-2 (classification), trained once per module."""

    def make(kind: str, arm: str):
        recipe = instruct() if kind == "llama" else classify("gpt2")
        training = {**recipe.training, "max_steps": 4, "eval_strategy": "no"}
        recipe = Recipe(**{**vars(recipe), "training": training, "arms": {"full": Arm(learning_rate=1e-3)}})
        return train(recipe, arm, output=shared, resume=True)

    return make


def bases(recipe, quantise):
    task = task_of(recipe)
    prepared = task.prepare()
    torch.manual_seed(0)
    return task.load_base(prepared, quantise)[0].eval(), task.load_base(prepared)[0].eval()


@pytest.mark.parametrize("quantise", ARMS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_linear_layers_are_quantised_and_nothing_else(classify, kind, quantise):
    model, plain = bases(classify(kind), quantise)
    quantised = {n: p for n, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    others = [p for n, p in model.named_parameters() if n not in quantised]
    assert quantised and all(p.dtype == torch.float32 for p in others)
    assert not any("score" in name or "embed" in name or "wte" in name for name in quantised)
    count = sum(plain.get_parameter(name).numel() for name in quantised)
    recipe = classify(kind)
    assert quantised_weights(meta_model(recipe, load_config(recipe, num_labels=2))) == count
    stored = sum(p.numel() for p in quantised.values())
    assert stored == count // (2 if quantise == "nf4" else 1)


@pytest.mark.parametrize("quantise", ARMS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_dequantised_base_has_the_original_architecture_and_weights_close_to_it(classify, kind, quantise):
    model, plain = bases(classify(kind), quantise)
    restored = dequantised(model)
    weights, originals = dict(restored.named_parameters()), dict(plain.named_parameters())
    assert {n: p.shape for n, p in weights.items()} == {n: p.shape for n, p in originals.items()}
    assert any(isinstance(m, Conv1D) for m in restored.modules()) == (kind == "gpt2")
    # relative to the largest weight: NF4's largest step is 0.3 (from -1 to -0.70), int8's 1/127; the error is half
    tolerance = 0.17 if quantise == "nf4" else 0.01
    for name in (n for n in weights if "score" not in n):
        error = (weights[name] - originals[name]).abs().max()
        assert error <= tolerance * originals[name].abs().max() + 1e-6, name


@pytest.mark.parametrize("arm", ARMS.values())
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_adapter_on_a_quantised_base_is_saved_reloaded_and_merged_into_full_weights(run, kind, arm):
    trained = run(kind, arm)
    data = trained.data
    assert data["checks"]["frozen"] is True and data["checks"]["learning"] is True
    assert data["checks"]["reload"] < (1e-5 if arm == "qlora" else TOLERANCE["int8"])
    assert data["checks"]["merge"] < 1e-4
    # NF4 computes with the dequantised weights; int8 also rounds the inputs of each layer
    assert data["checks"]["dequantised"] < (1e-4 if arm == "qlora" else 0.2)
    assert ARMS[data["quantise"]] == arm
    assert not list(trained.folder.glob("model*.safetensors"))
    if kind == "gpt2":  # the layers are no longer Conv1D
        assert json.loads((trained.folder / "adapter_config.json").read_text())["fan_in_fan_out"] is False


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_check_of_a_saved_adapter_loads_its_base_quantised(run, kind):
    findings = check_adapter(run(kind, "qlora").folder)
    assert all(finding.ok for finding in findings), findings


def test_evaluation_changes_no_quantised_weight(classify):
    """On CPUs with bf16, bitsandbytes would repack NF4 weights at the first evaluation, then compute in bf16."""
    import bitsandbytes

    layer = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(8, 8))
    layer[0].support_avx512bf16_for_cpu = True
    disable_bf16_kernels(layer)
    assert layer[0].support_avx512bf16_for_cpu is False
    model, _ = bases(classify("llama"), "nf4")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_dpo_trains_in_fp32_on_a_quantised_base(prefer, tiny, tmp_path):
    recipe = prefer(model=str(tiny("llama", 64)))
    recipe = recipe.with_changes({"training": {"max_steps": 2}})
    trained = train(recipe, "qlora", output=tmp_path)
    assert trained.ok and trained.data["checks"]["reload"] < 1e-5  # trl would round the trained weights to bf16


def test_a_comparison_includes_a_quantised_arm(instruct, tmp_path):
    recipe = instruct(training={**instruct().training, "max_steps": 3})
    comparison = compared_here(recipe, ["full", "qlora"], [0], tmp_path)
    row = comparison.data["arms"]["qlora"]
    assert row["status"] == "ok", row["error"]
    assert row["quantise"] == "nf4" and "qlora" in comparison.data["differences"]
    assert "QLoRA r=16" in comparison.table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "full", "quantise": "nf4"}, "use a PEFT adapter on them"),
        ({"peft": {"peft_type": "LORA"}, "quantise": "nf5"}, "Did you mean 'nf4'"),
        ({"method": "full", "lora_plus_ratio": 4}, "only LoRA has an A and a B"),
        ({"peft": {"peft_type": "LORA"}, "lora_plus_ratio": 0.5}, "1 or more"),
        ({"method": "full", "quantize": "nf4"}, "Did you mean 'quantise'"),
    ],
)
def test_a_wrong_option_of_an_arm_is_an_error(instruct, change, message):
    plain = instruct().to_dict()
    plain["arms"] = {"other": {"learning_rate": 1e-3, **change}}
    if change.get("method") != "full":
        plain["arms"]["full"] = {"method": "full"}
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(plain)


def test_without_bitsandbytes_the_extra_is_named(instruct, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    hidden = lambda name, *a: None if name == "bitsandbytes" else find(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    arms = {"full": Arm(learning_rate=1e-3, optim="adamw_8bit"), "mine": Arm(LoraConfig(r=2), 1e-3, quantise="int8")}
    for arm in arms:
        with pytest.raises(RecipeError, match=r"pip install 'peft_recipes\[quantised\]'"):
            train(instruct(arms=arms), arm, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_full_arm_can_use_an_8_bit_optimizer(instruct, tmp_path):
    arm = Arm(learning_rate=1e-3, optim="adamw_8bit")
    run = train(instruct(arms={"full": arm}), "full", output=tmp_path)
    assert run.ok and Recipe.from_yaml(run.folder / "recipe.yaml").arms["full"].optim == "adamw_8bit"
    plain = CliRunner().invoke(app, ["plan", str(run.folder / "recipe.yaml"), "--json"])
    memory = json.loads(plain.stdout)["arms"]["full"]["memory"]
    assert memory["optimizer"] < 1.1 * memory["gradients"] / 2


def test_nf4_widths_that_bitsandbytes_gets_wrong_on_a_cpu_are_an_error(classify, tiny):
    with pytest.raises(RecipeError, match=r"rows of 32 weights.*multiple of 64"):
        bases(classify("llama", model=str(tiny("llama"))), "nf4")
