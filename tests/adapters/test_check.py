"""The checks of a saved adapter, trained here or elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from malformed import change_tensors
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from peft_recipes import RecipeError, targets, train
from peft_recipes.adapters.check import check_adapter
from peft_recipes.cli.app import app
from peft_recipes.runs.outputs import OUTPUTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def own(classify, runs):
    """The folder of a run; trained once."""
    folder = runs / "tiny" / "lora" / "seed-0"
    if not folder.exists():
        train(classify(), "lora", output=runs)
    return folder


@pytest.fixture
def copy(own, tmp_path):
    return shutil.copytree(own, tmp_path / "copy")


@pytest.fixture
def foreign(tiny, tmp_path):
    """An adapter made and saved by plain PEFT."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
                                            init_lora_weights=False))  # fmt: skip
    model.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def results(folder, *args, **options):
    return {finding.name: finding.ok for finding in check_adapter(folder, *args, **options)}


def test_an_adapter_trained_here_passes(own):
    assert (own / OUTPUTS).is_file()
    assert results(own) == {"adapter-only": True, "finite": True, "learning": True, "fits": True, "reload": True,
                            "merge": True}  # fmt: skip


def test_a_causal_lora_and_a_prompt_tuning_pass(instruct, tmp_path):
    from peft_recipes import Arm

    prompt = Arm(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), learning_rate=1e-2)
    recipe = instruct(arms={"lora": instruct().arms["lora"], "prompt": prompt})
    lora, prompt = (train(recipe, arm, output=tmp_path).folder for arm in recipe.arms)
    assert set(results(lora).values()) == {True}
    found = results(prompt)
    assert found["reload"] and found["fits"] and found["learning"] is None and found["merge"] is None


def test_an_adapter_of_plain_peft_passes(foreign):
    assert results(foreign) == {"adapter-only": True, "finite": True, "learning": True, "fits": True, "reload": None,
                                "merge": True}  # fmt: skip


def test_a_classifier_of_plain_peft_passes(tiny, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny("distilbert"), num_labels=3)
    config = LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    found = {finding.name: finding for finding in check_adapter(tmp_path)}
    assert found["fits"].ok, found["fits"].message


def test_the_command_line_prints_each_check(own, copy):
    shown = CliRunner().invoke(app, ["check", str(own)])
    assert shown.exit_code == 0 and "ok   reload" in shown.stdout
    data = json.loads(CliRunner().invoke(app, ["check", str(own), "--quick", "--json"]).stdout)
    assert [row["name"] for row in data] == ["adapter-only", "finite", "learning", "fits"]
    change_tensors(copy, "nan")
    shown = CliRunner().invoke(app, ["check", str(copy)])
    assert shown.exit_code == 1 and "FAIL finite" in shown.stdout


def test_a_folder_that_also_holds_the_base_fails(copy, tiny):
    shutil.copy(tiny("distilbert") / "model.safetensors", copy)
    assert results(copy)["adapter-only"] is False


def test_an_adapter_of_another_base_fails_and_both_bases_are_named(foreign, tiny):
    found = {finding.name: finding for finding in check_adapter(foreign, str(tiny("gpt2")))}
    assert found["fits"].ok is False
    assert str(tiny("llama")) in found["fits"].message and str(tiny("gpt2")) in found["fits"].message


def test_a_downloaded_recipe_can_not_switch_remote_code_on(copy):
    from peft_recipes.adapters.infer_task import infer_task
    from peft_recipes.adapters.saved import read_adapter

    path = copy / "recipe.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert infer_task(read_adapter(copy), None, False).recipe.trust_remote_code is False


def test_a_folder_without_an_adapter_raises_and_names_those_below(own, runs):
    with pytest.raises(RecipeError, match=r"There are adapters in: .*seed-0"):
        check_adapter(runs)
    with pytest.raises(RecipeError, match="no folder"):
        check_adapter(runs / "nothing")


def test_a_gpt2_with_conv1d_layers_can_be_merged(tiny, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    config = LoraConfig(r=2, target_modules=targets("gpt2", "attention"), task_type="CAUSAL_LM", fan_in_fan_out=True,
                        init_lora_weights=False)  # fmt: skip
    get_peft_model(base, config).save_pretrained(tmp_path)
    assert results(tmp_path)["merge"]


# Adapters whose base is made within a second; that of SmolLM2 comes from a package of 100 MB.
KEPT = sorted(Path(__file__).parents[2].glob("adapters/mnist-shift/*/seed-*/adapter_config.json"))


@pytest.mark.parametrize("config", KEPT, ids=lambda path: "-".join(path.parts[-4:-1]))
def test_the_kept_adapters_pass(config):
    found = {finding.name: finding for finding in check_adapter(config.parent, weights=False)}
    assert all(finding.ok for finding in found.values()), found


def test_a_kept_adapter_passes_with_its_base():
    """Its base, an image model, is trained first; the adapter may have no stored outputs."""
    found = {finding.name: finding for finding in check_adapter(KEPT[0].parent)}
    assert found["merge"].ok and found["reload"].ok is not False
