"""Exports for vLLM and as LoRA: the same outputs, the servers' rules, what a conversion loses."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from exported_models import save_model
from saved_adapters import lora, saved
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_recipes import RecipeError, train
from peft_recipes.cli.app import app
from peft_recipes.exporting.export import export_adapter

IDS = {"input_ids": torch.arange(3, 19)[None]}
TARGETS = {"target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama") / "base")


def logits(base, adapter):
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(**IDS).logits


def test_a_folder_for_vllm_is_the_adapter_with_one_rank_and_scale(base, tmp_path):
    options = {"r": 4, "use_rslora": True, "rank_pattern": {"v_proj": 12}, "alpha_pattern": {"0.self_attn.q_proj": 3}}
    adapter = saved(base, tmp_path / "adapter", lora(**options))
    done = call("export", adapter, "--to", "vllm", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (12, 12, {}, False)
    torch.testing.assert_close(logits(base, tmp_path / "out"), logits(base, adapter), atol=1e-3, rtol=1e-3)
    assert f"vllm serve {base} --enable-lora --max-lora-rank 16 --lora-modules NAME={tmp_path / 'out'}" in done.stdout
    assert "sglang.launch_server" in done.stdout and "vLLM was not run" in done.stdout
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    made = json.loads((tmp_path / "out" / "export.json").read_text())
    assert made["verification"]["passed"] and made["rescaled"]


def test_what_vllm_serves_no_adapter_of_is_named(tmp_path):
    base = save_model(tmp_path / "gpt2", "gpt2")
    adapter = saved(base, tmp_path / "adapter", lora(target_modules=["c_attn"]))
    with pytest.raises(RecipeError, match="serves gpt2 without adapters: merge it"):
        export_adapter(adapter, tmp_path / "out", "vllm")


METHODS = {
    "dora": (lora(r=4, use_dora=True), "merged"),
    "ia3": (peft.IA3Config(**TARGETS, feedforward_modules=["up_proj"]), "merged"),
    "oft": (peft.OFTConfig(**TARGETS, r=0, oft_block_size=16), "merged"),
    "loha": (peft.LoHaConfig(**TARGETS, r=2), "peft"),
    "lokr": (peft.LoKrConfig(**TARGETS, r=2), "peft"),
    "vera": (peft.VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=8), "peft"),
    "pissa": (lora(r=4, init_lora_weights="pissa"), "merged"),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_method_that_changes_weights_becomes_a_lora(base, tmp_path, method):
    config, by = METHODS[method]
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "adapter")
    before = logits(base, tmp_path / "adapter")
    made = export_adapter(tmp_path / "adapter", tmp_path / "full", "lora", rank=32)
    after = logits(base, tmp_path / "full")
    plain = AutoModelForCausalLM.from_pretrained(base)(**IDS).logits
    assert (after - before).abs().max() < 0.7 * (plain - before).abs().max()
    assert made["converted_by"].startswith("peft") == (by == "peft") and made["test"] is None
    assert made["kept_of_change"] > 0.5


def test_a_dora_keeps_its_magnitude(base, tmp_path):
    """PEFT 0.21 converts DoRA without it; `convert_to_lora` would be enough if this failed."""
    adapter = saved(base, tmp_path / "dora", lora(r=2, use_dora=True, target_modules=["q_proj"]))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    model.save_pretrained(adapter)
    made = export_adapter(adapter, tmp_path / "lora", "lora", rank=64)
    assert made["kept_of_change"] == pytest.approx(1)
    torch.testing.assert_close(logits(base, tmp_path / "lora"), logits(base, adapter), atol=1e-3, rtol=1e-3)
    served = export_adapter(tmp_path / "lora", tmp_path / "served", "vllm")
    assert served["max_lora_rank"] == 64 and served["verification"]["passed"]


def test_a_conversion_is_measured_on_the_runs_test_set(classify, tmp_path):
    run = train(classify(), "lora", output=tmp_path / "runs").folder
    done = call("export", run, "--to", "lora", "--rank", "2", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    made = json.loads((tmp_path / "out" / "export.json").read_text())
    row = made["test"]
    assert row["metric"] == "accuracy" and len(row["difference"]["ci95"]) == 2 and row["verdict"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "95 % interval" in card and f"{row['original']:.4f} before" in card
    again = call("evaluate", tmp_path / "out", "--json")
    assert json.loads(again.stdout)["results"]["test"]["adapter"] == pytest.approx(row["lora"])


def test_a_method_without_weights_is_refused_with_those_that_have(base, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    done = call("export", tmp_path / "adapter", "--to", "lora", "--rank", "4", "--output", tmp_path / "out")
    assert done.exit_code == 2 and "PROMPT_TUNING, which changes the input" in done.stderr and "DoRA" in done.stderr


def test_a_rank_above_the_weights_is_one_line(base, tmp_path):
    adapter = saved(base, tmp_path / "adapter", lora(use_dora=True))
    done = call("export", adapter, "--to", "lora", "--rank", "999", "--output", tmp_path / "out")
    assert done.exit_code == 2 and "--rank 999" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_classifiers_go_to_no_server_of_language_models(classify, tmp_path):
    run = train(classify(), "lora", output=tmp_path / "runs").folder
    for to, server in (("gguf", "llama.cpp"), ("vllm", "vLLM")):
        done = call("export", run, "--to", to, "--output", tmp_path / "out")
        assert done.exit_code == 2 and f"{server} takes adapters of causal language models" in done.stderr
