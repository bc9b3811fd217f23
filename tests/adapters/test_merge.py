"""Merging and combining: the same outputs as before, or nothing is written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import IA3Config, PeftModel
from saved_adapters import lora, saved
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from peft_recipes import RecipeError, train
from peft_recipes.adapters.combine import METHODS, combine_adapters
from peft_recipes.adapters.merge import merge_adapter
from peft_recipes.cli.app import app

IDS = {"input_ids": torch.arange(3, 19)[None]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(instruct, runs):
    """A run of a causal model; trained once."""
    folder = runs / "tiny-sft" / "lora" / "seed-0"
    if not folder.exists():
        train(instruct(), "lora", output=runs)
    return folder


@pytest.fixture
def foreign(tiny, tmp_path):
    return saved(tiny("llama"), tmp_path / "foreign")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def logits(model):
    with torch.no_grad():
        return model.eval()(**IDS).logits


def test_a_merged_run_is_a_transformers_folder_with_its_evidence(run, tiny, tmp_path):
    done = call("merge", run, "--output", tmp_path / "merged", "--json")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert made == json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert made["inputs"] == {"count": 8, "source": "the run's test split"} and made["largest_logit_difference"] < 1e-4
    evidence = json.loads((run / "run.json").read_text())["metrics"]["test"]
    assert made["before"] == pytest.approx(evidence) and made["after"] == pytest.approx(evidence, rel=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged_model) - logits(base)).abs().max() > 1e-4  # the adapter is trained
    torch.testing.assert_close(logits(merged_model), logits(PeftModel.from_pretrained(base, run)))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("good film")["input_ids"]
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "merged").glob("*.json"))


def test_a_merged_classifier_keeps_its_head_and_class_names(classify, tmp_path):
    folder = train(classify(), "lora", output=tmp_path / "runs").folder
    made = merge_adapter(folder, tmp_path / "merged")
    assert made["metric"] == "accuracy" and made["before"]["accuracy"] == made["after"]["accuracy"]
    assert made["loaded_by"] == "import transformers; transformers.AutoModelForSequenceClassification.from_pretrained"
    merged_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged_model.config.id2label == {0: "bad", 1: "good"}


def test_an_adapter_of_plain_peft_is_compared_on_token_ids(foreign, tmp_path):
    made = merge_adapter(foreign, tmp_path / "merged")
    assert made["inputs"]["source"] == "simple" and made["before"] is None and made["share_of_outputs"] < 1e-4


def test_beyond_tolerance_nothing_is_written(run, tmp_path):
    done = call("merge", run, "--output", tmp_path / "out" / "merged", "--tolerance", "1e-12")
    assert done.exit_code == 1 and "Refused" in done.stderr and "more than 1e-12" in done.stderr
    assert not any((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_user_mistakes_in_merging(run, tiny, foreign, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    ia3 = saved(tiny("llama"), tmp_path / "prompt", IA3Config(target_modules=["q_proj"], feedforward_modules=[],
                                                             task_type="CAUSAL_LM"))  # fmt: skip
    assert merge_adapter(ia3, tmp_path / "ia3")["method"] == "IA3"
    for words, message in (
        ([run, "--output", tmp_path / "full"], "something is there already"),
        ([tmp_path, "--output", tmp_path / "x"], "There are adapters in"),
        ([tmp_path / "nothing", "--output", tmp_path / "x"], "no folder"),
        ([run, "--output", "/dev/null/x"], "is a file"),
        ([run, "--output", tmp_path / "x", "--base", tiny("gpt2")], "does not fit its base"),
        ([foreign, "--output", tmp_path / "x", "--base", "./none"], "no config.json"),
        ([run, "--output", tmp_path / "x", "--tolerance", "0"], "above 0"),
    ):
        done = call("merge", *words)
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), (words, done.stderr)
        assert "Traceback" not in done.output and not (tmp_path / "x").exists()


def delta(model, name):
    """The weight update of each adapted layer."""
    return {path: layer.get_delta_weight(name) for path, layer in model.named_modules()
            if hasattr(layer, "get_delta_weight") and name in layer.lora_A}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_each_combination_method_gives_a_plain_adapter(method, tiny, tmp_path):
    folders = [saved(tiny("llama"), tmp_path / name, seed=i) for i, name in enumerate("ab")]
    made = combine_adapters(folders, tmp_path / "both", [0.7, 0.3], method)
    assert made["rank"] == (4 if method == "cat" else 2) and made["weights"] == {"a": 0.7, "b": 0.3}
    assert made["test_sets"]["a"]["metric"] is None
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    assert torch.isfinite(logits(PeftModel.from_pretrained(base, tmp_path / "both"))).all()


@pytest.mark.parametrize("rslora", [False, True])
def test_cat_is_exactly_the_weighted_sum(rslora, tiny, tmp_path):
    """With rsLoRA too, for which PEFT by itself would scale the combination by the square root of its rank."""
    configs = [lora(r=4, lora_alpha=3, use_rslora=rslora), lora(r=2, lora_alpha=5)]
    folders = [saved(tiny("llama"), tmp_path / n, c, i) for i, (n, c) in enumerate(zip("ab", configs, strict=True))]
    combine_adapters(folders, tmp_path / "both", [0.7, -0.3], "cat")
    found = []
    for folder in (*folders, tmp_path / "both"):
        base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
        found.append(delta(PeftModel.from_pretrained(base, folder), "default"))
    for path, value in found[2].items():
        torch.testing.assert_close(value, 0.7 * found[0][path] - 0.3 * found[1][path])


def test_a_combination_is_evaluated_on_each_runs_test_set(run, instruct, runs, tmp_path):
    recipe = instruct(name="other", dataset=dataclasses.replace(instruct().dataset, seed=7))
    other = train(recipe, "lora", output=runs).folder
    done = call(
        "combine", run, other, "--weights", "0.5,0.5", "--method", "cat", "--output", tmp_path / "both", "--json"
    )
    assert done.exit_code == 0, done.stderr
    sets = json.loads(done.stdout)["test_sets"]
    assert list(sets) == ["tiny-sft-lora-seed-0", "other-lora-seed-0"]
    for folder, found in zip((run, other), sets.values(), strict=True):
        own = json.loads((folder / "run.json").read_text())["metrics"]["test"]
        assert found["own"]["loss"] == pytest.approx(own["loss"], rel=1e-4)
        assert found["base"]["loss"] != found["own"]["loss"] != found["combined"]["loss"]
    files = {path.name for path in (tmp_path / "both").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "combine.json", "recipe.yaml"}
    merged = merge_adapter(tmp_path / "both", tmp_path / "merged")  # the combination can be merged
    assert merged["before"]["loss"] == pytest.approx(sets["tiny-sft-lora-seed-0"]["combined"]["loss"], rel=1e-4)


def test_user_mistakes_in_combining(foreign, tiny, tmp_path):
    second = saved(tiny("llama"), tmp_path / "second", lora(r=4))
    gpt2 = saved(tiny("gpt2"), tmp_path / "gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True))
    dora = saved(tiny("llama"), tmp_path / "dora", lora(use_dora=True))
    heads = [saved(tiny("distilbert"), tmp_path / n, lora(target_modules=["q_lin"], task_type="SEQ_CLS"), labels=2)
             for n in ("h1", "h2")]  # fmt: skip
    for words, message in (
        ([foreign, gpt2], f"made for '{tiny('llama')}', {gpt2} for '{tiny('gpt2')}'"),
        ([foreign], "two adapters or more"),
        ([foreign, foreign], "given twice"),
        ([foreign, second, "--method", "linear"], "one rank; these have foreign 2, second 4. Use cat, svd."),
        ([foreign, second, "--method", "tise"], "Did you mean 'ties'"),
        ([foreign, second, "--weights", "0.5"], "1 weights for 2 adapters"),
        ([foreign, second, "--weights", "0.5,x"], "as in 0.5,0.5"),
        ([foreign, second, "--weights", "nan,1"], "expected numbers"),
        ([foreign, second, "--density", "0.3"], "for ties, dare"),
        ([foreign, second, "--method", "cat", "--rank", "3"], "for svd"),
        ([foreign, dora], "is DoRA"),
        (heads, "a head of its own"),
        ([foreign, tmp_path / "none"], "no folder"),
    ):
        done = call("combine", *words, "--output", tmp_path / "x")
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), (words, done.stderr)
        assert not (tmp_path / "x").exists() and done.stdout == ""
    with pytest.raises(RecipeError, match="something is there"):
        combine_adapters([foreign, second], second)


def test_a_quantised_base_is_dequantised_first_and_both_differences_are_reported(instruct, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    training = {**instruct().training, "max_steps": 2, "eval_strategy": "no"}
    recipe = instruct(model=str(tiny("llama", 64)), training=training)  # NF4's blocks are of 64 weights
    folder = train(recipe, "qlora", output=tmp_path / "runs").folder
    done = call("merge", folder, "--output", tmp_path / "merged", "--json")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["dequantised"]["from"] == "nf4" and made["share_of_outputs"] < 1e-4
    assert made["dequantised"]["share_of_outputs"] < 0.05  # NF4 itself computes with the same weights
    assert made["before"]["loss"] == pytest.approx(made["after"]["loss"], rel=0.05)
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged_model.config, "quantization_config")
    assert {p.dtype for p in merged_model.parameters()} == {torch.float32}
    options = ["--prompt", "good film", "--merged", "--max-new-tokens", "2", "--json"]
    both = json.loads(call("generate", folder, *options).stdout)
    assert list(both[0]["answers"]) == ["base", "qlora", "qlora-merged"]
