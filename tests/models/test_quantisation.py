"""Quantised bases: what is quantised, what an adapter on one gives back, and into what it is merged."""

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
from peft_recipes.models.quantisation import BYTES, TOLERANCE, dequantised, keep_exact, quantised_weights
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.tasks.registry import task_of

ARMS = {"nf4": "qlora", "int8": "lora-int8"}


@pytest.fixture
def classify(classify, tiny):
    """On bases wide enough for NF4's blocks of 64 weights."""
    return lambda kind="distilbert", **changes: classify(kind, **{"model": str(tiny(kind, 64)), **changes})


@pytest.fixture
def instruct(instruct, tiny):
    """Likewise."""
    return lambda kind="llama", **changes: instruct(kind, **{"model": str(tiny(kind, 64)), **changes})


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture
def run(instruct, classify, shared):
    """run(kind, arm) -> a run on a tiny Llama (sft) or GPT-2 (classification), trained once a module."""

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


@pytest.mark.parametrize("quantise", BYTES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_linear_layers_are_quantised_and_nothing_else(classify, kind, quantise):
    model, plain = bases(classify(kind), quantise)
    small = {n: p for n, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    left = {n: p for n, p in model.named_parameters() if n not in small}
    assert small and all(p.dtype == torch.float32 for p in left.values())
    assert not any("score" in name or "embed" in name or "wte" in name for name in small)
    count = sum(dict(plain.named_parameters())[name].numel() for name in small)
    task = task_of(classify(kind))
    from peft_recipes.models import bases as loader
    from peft_recipes.models.meta import meta_model

    assert quantised_weights(meta_model(task.recipe, loader.load_config(task.recipe, num_labels=2))) == count
    stored = sum(p.numel() for p in small.values())
    assert stored == count // (2 if quantise == "nf4" else 1)


@pytest.mark.parametrize("quantise", BYTES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_dequantised_base_is_one_of_its_own_kind_and_near_the_original(classify, kind, quantise):
    model, plain = bases(classify(kind), quantise)
    whole = dequantised(model)
    mine, theirs = dict(whole.named_parameters()), dict(plain.named_parameters())
    assert mine.keys() == theirs.keys() and all(mine[n].shape == theirs[n].shape for n in mine)
    assert any(isinstance(m, Conv1D) for m in whole.modules()) == (kind == "gpt2")
    # Of the largest weight: NF4's furthest neighbours lie 0.3 apart (-1 and -0.70), int8's 1/127; both rounded.
    tolerance = 0.17 if quantise == "nf4" else 0.01
    for name in (n for n in mine if "score" not in n):
        assert (mine[name] - theirs[name]).abs().max() <= tolerance * theirs[name].abs().max() + 1e-6, name


@pytest.mark.parametrize("arm", ARMS.values())
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_arm_on_a_quantised_base_is_saved_alone_reloaded_and_merged_into_full_weights(run, kind, arm):
    found = run(kind, arm)
    data = found.data
    assert data["checks"]["frozen"] is True and data["checks"]["learning"] is True
    # int8 rounds the inputs of each layer: the last bit of a float may be a whole step behind the next one.
    assert data["checks"]["reload"] < (1e-5 if arm == "qlora" else TOLERANCE["int8"])
    assert data["checks"]["merge"] < 1e-4
    # NF4's weights are computed with as they are; int8 rounds the inputs of each layer as well.
    assert data["checks"]["dequantised"] < (1e-4 if arm == "qlora" else 0.2)
    assert data["quantise"] == {"qlora": "nf4", "lora-int8": "int8"}[arm]
    assert not list(found.folder.glob("model*.safetensors"))
    if kind == "gpt2":  # PEFT must not turn the weights of what is no Conv1D any more
        assert json.loads((found.folder / "adapter_config.json").read_text())["fan_in_fan_out"] is False


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_check_of_a_saved_adapter_loads_its_base_quantised(run, kind):
    found = {finding.name: finding for finding in check_adapter(run(kind, "qlora").folder)}
    assert all(finding.ok for finding in found.values()), found


def test_evaluation_changes_no_quantised_weight(classify):
    """On a CPU with bf16, bitsandbytes repacks NF4 weights at the first evaluation, and computes in bf16 from then."""
    import bitsandbytes

    layer = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(8, 8))
    layer[0].support_avx512bf16_for_cpu = True
    keep_exact(layer)
    assert layer[0].support_avx512bf16_for_cpu is False
    model, _ = bases(classify("llama"), "nf4")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_preferences_are_learnt_in_fp32_on_a_quantised_base(prefer, tiny, tmp_path):
    recipe = prefer(model=str(tiny("llama", 64)))
    recipe = recipe.with_changes({"training": {"max_steps": 2}})
    made = train(recipe, "qlora", output=tmp_path)
    assert made.ok and made.data["checks"]["reload"] < 1e-5  # trl would have rounded what it learnt to bf16


def test_a_comparison_holds_a_quantised_arm_beside_the_others(instruct, tmp_path):
    recipe = instruct(training={**instruct().training, "max_steps": 3})
    made = compared_here(recipe, ["full", "qlora"], [0], tmp_path)
    row = made.data["arms"]["qlora"]
    assert row["status"] == "ok", row["error"]
    assert row["quantise"] == "nf4" and "qlora" in made.data["differences"]
    assert "QLoRA r=16" in made.table()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "full", "quantise": "nf4"}, "only a PEFT adapter can sit on one"),
        ({"peft": {"peft_type": "LORA"}, "quantise": "nf5"}, "Did you mean 'nf4'"),
        ({"method": "full", "lora_plus_ratio": 4}, "only LoRA has an A and a B"),
        ({"peft": {"peft_type": "LORA"}, "lora_plus_ratio": 0.5}, "1 or more"),
        ({"method": "full", "quantize": "nf4"}, "Did you mean 'quantise'"),
    ],
)
def test_a_wrong_option_of_an_arm_is_told(instruct, change, said):
    plain = instruct().to_dict()
    plain["arms"] = {"full": {"method": "full"}, "other": {"learning_rate": 1e-3, **change}}
    if change.get("method") == "full":
        plain["arms"] = {"other": {"learning_rate": 1e-3, **change}}
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict(plain)


def test_without_bitsandbytes_the_extra_is_named(instruct, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    arms = {"full": Arm(learning_rate=1e-3, optim="adamw_8bit"), "mine": Arm(LoraConfig(r=2), 1e-3, quantise="int8")}
    for arm in arms:
        with pytest.raises(RecipeError, match=r"pip install 'peft_recipes\[quantised\]'"):
            train(instruct(arms=arms), arm, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_full_arm_may_keep_its_optimizer_in_eight_bits(instruct, tmp_path):
    arm = Arm(learning_rate=1e-3, optim="adamw_8bit")
    run = train(instruct(arms={"full": arm}), "full", output=tmp_path)
    assert run.ok and Recipe.from_yaml(run.folder / "recipe.yaml").arms["full"].optim == "adamw_8bit"
    plain = CliRunner().invoke(app, ["plan", str(run.folder / "recipe.yaml"), "--json"])
    memory = json.loads(plain.stdout)["arms"]["full"]["memory"]
    assert memory["optimizer"] < 1.1 * memory["gradients"] / 2


def test_nf4_rows_that_bitsandbytes_garbles_on_a_cpu_are_refused(classify, tiny):
    with pytest.raises(RecipeError, match=r"rows of 32 weights.*multiple of 64"):
        bases(classify("llama", model=str(tiny("llama"))), "nf4")
