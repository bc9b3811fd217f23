"""`evaluate`: a base and a saved adapter side by side, on benchmarks and on the test split of a run."""

from __future__ import annotations

import json

import pytest
from benchmark_files import choices
from peft import PeftModel
from saved_adapters import lora, saved
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peft_recipes import RecipeError, train
from peft_recipes.cli.app import app
from peft_recipes.inference.evaluate import evaluate
from peft_recipes.scoring import benchmark_tasks
from peft_recipes.scoring.benchmarks import run_benchmark


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return choices(tmp_path_factory.mktemp("benchmark"))


def test_an_adapter_of_plain_peft_is_compared_with_its_base(tiny, words, tmp_path):
    folder = saved(tiny("llama"), tmp_path / "adapter")
    result = evaluate(folder, [str(words)])
    row = result["results"]["words"]
    tasks = benchmark_tasks.load([str(words)])["words"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny("llama")), AutoTokenizer.from_pretrained(tiny("llama"))
    before = run_benchmark(model, tokenizer, tasks).metrics
    after = run_benchmark(PeftModel.from_pretrained(model, folder), tokenizer, tasks).metrics
    assert row["base"] == before["acc"] and row["adapter"] == after["acc"] and before != after
    assert row["difference"]["estimate"] == pytest.approx(after["acc"] - before["acc"])
    low, high = row["difference"]["ci95"]
    assert low < row["difference"]["estimate"] < high and row["examples"] == 24


def test_a_run_is_tested_again_as_its_recipe_says(instruct, words, tmp_path):
    recipe = instruct(benchmarks=[str(words)])
    run, base = (train(recipe, arm, output=tmp_path) for arm in ("lora", "base"))
    result = evaluate(run.folder)
    row = result["results"]["test"]
    assert list(result["results"]) == ["test"]  # a task's file may run code: it is named again, or left out
    assert row["metric"] == "loss" and row["adapter"] == pytest.approx(run.metrics["test"]["loss"], rel=1e-5)
    assert row["base"] == pytest.approx(base.metrics["test"]["loss"], rel=1e-5)
    assert row["verdict"] in ("better", "worse", "equivalent", "not shown")
    again = evaluate(run.folder, [str(words)])["results"]["words"]
    assert again["adapter"] == run.metrics["words"]["acc"] and again["base"] == base.metrics["words"]["acc"]


def test_the_command_prints_a_table_or_json(tiny, words, tmp_path):
    folder = saved(tiny("llama"), tmp_path / "adapter")
    shown = CliRunner().invoke(app, ["evaluate", str(folder), "--benchmarks", str(words), "--benchmark-examples", "6"])
    assert shown.exit_code == 0, shown.stderr
    assert "words" in shown.stdout and "95 % interval" in shown.stdout and "accuracy of 6 examples" in shown.stdout
    printed = CliRunner().invoke(app, ["evaluate", str(folder), "--benchmarks", str(words), "--json"])
    assert json.loads(printed.stdout)["results"]["words"]["examples"] == 24


def test_nothing_to_evaluate_is_an_error(tiny, classify, words, tmp_path):
    folder = saved(tiny("llama"), tmp_path / "adapter")
    with pytest.raises(RecipeError, match="Name --benchmarks"):
        evaluate(folder)
    with pytest.raises(RecipeError, match=r"there is no file .*wrods\.yaml.*Did you mean 'words\.yaml'"):
        evaluate(folder, [str(words.with_name("wrods.yaml"))])
    classifier = saved(tiny("llama"), tmp_path / "classifier", lora(task_type="SEQ_CLS"), labels=2)
    with pytest.raises(RecipeError, match=r"for language models .*, not for text-classification"):
        evaluate(classifier, [str(words)])
