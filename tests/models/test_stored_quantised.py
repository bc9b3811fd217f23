"""Bases that are stored in 4 or 8 bits: adapters are trained on them so, and merged into their dequantised weights."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from saved_adapters import lora, saved
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from peft_recipes import Arm, RecipeError, plan, train
from peft_recipes.adapters.check import check_adapter
from peft_recipes.adapters.merge import merge_adapter
from peft_recipes.cli.app import app
from peft_recipes.models import bases

IDS = {"input_ids": torch.arange(3, 19)[None]}
_FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """stored(format) -> the folder of a base whose weights are in it."""
    folders = {}

    def make(name: str):
        if name not in folders:
            folder, whole = tmp_path_factory.mktemp(name) / "base", tiny("llama", 64)
            settings = BitsAndBytesConfig(**_FORMATS[name])
            AutoModelForCausalLM.from_pretrained(whole, quantization_config=settings).save_pretrained(folder)
            for file in whole.glob("*token*"):
                (folder / file.name).write_bytes(file.read_bytes())
            for file in whole.glob("*.jinja"):
                (folder / file.name).write_bytes(file.read_bytes())
            folders[name] = folder
        return folders[name]

    return make


def adapter_of(tiny, base, folder):
    saved(tiny("llama", 64), folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", _FORMATS)
def test_an_adapter_is_checked_and_merged_into_the_dequantised_base(tiny, stored, tmp_path, name):
    folder = adapter_of(tiny, stored(name), tmp_path / "adapter")
    assert [each for each in check_adapter(folder) if each.ok is False] == []
    done = CliRunner().invoke(app, ["merge", str(folder), "--output", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.stderr
    assert f"the base was {name}" in done.stdout
    whole = AutoModelForCausalLM.from_pretrained(stored(name), dtype=torch.float32).dequantize(dtype=torch.float32)
    expected = PeftModel.from_pretrained(whole.float(), folder).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**IDS).logits, expected(**IDS).logits, atol=2e-2, rtol=2e-2)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_run_on_such_a_base_is_trained_and_can_be_merged(instruct, stored, tmp_path):
    run = train(instruct(model=str(stored("nf4"))), "lora", output=tmp_path)
    assert run.ok and not run.failed_checks and run.data["quantise"] == "nf4"
    assert any("stored in nf4" in note for note in run.data["notes"])
    merge_adapter(run.folder, tmp_path / "merged")


def test_the_full_arm_is_refused_before_the_start(instruct, stored, tmp_path):
    recipe = instruct(model=str(stored("nf4")))
    for refused in (lambda: train(recipe, "full", output=tmp_path), lambda: plan(recipe)):
        with pytest.raises(RecipeError, match=r"'full'.*stored in nf4, which can't be trained"):
            refused()
    assert not list(tmp_path.iterdir())
    assert plan(recipe, ["lora"])["arms"]["lora"]["memory"]["fits"]


def test_another_quantisation_than_the_stored_one_is_refused(instruct, stored):
    arm = Arm(LoraConfig(r=2, target_modules=["q_proj"]), learning_rate=1e-3, quantise="int8")
    with pytest.raises(RecipeError, match="stored in nf4, not in int8"):
        plan(instruct(model=str(stored("nf4")), arms={"lora": arm}))


def test_a_new_classification_head_is_not_quantised(classify, stored):
    from transformers import AutoModelForSequenceClassification

    recipe = classify("llama", model=str(stored("nf4")))
    model, new = bases.load_model(recipe, AutoModelForSequenceClassification, quantise="nf4", num_labels=2)
    assert new == ["score.weight"] and model.score.weight.dtype == torch.float32
    assert model.config.num_labels == 2


def test_the_base_alone_is_evaluated_dequantised(instruct, stored, tmp_path):
    run = train(instruct(model=str(stored("nf4")), prompts=[]), "base", output=tmp_path)
    assert run.ok


def test_a_base_of_another_library_is_refused_by_name(instruct, tiny, tmp_path):
    config = json.loads((tiny("llama") / "config.json").read_text())
    for file in tiny("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="stored in gptq"):
        plan(instruct(model=str(tmp_path)))
    folder = saved(tiny("llama"), tmp_path / "adapter", lora())
    done = CliRunner().invoke(app, ["merge", str(folder), "--base", str(tmp_path), "--output", str(tmp_path / "m")])
    assert done.exit_code == 2 and "stored in gptq" in done.stderr and "--base" in done.stderr
