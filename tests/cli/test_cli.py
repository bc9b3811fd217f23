"""The command line: exit codes, one message and nothing written after a user error, only JSON on stdout with --json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner
from warm_python import warm

from peft_recipes.cli.app import app


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call("plan", ...) runs the command in an empty folder and returns its result."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def yaml(classify, tmp_path):
    """Return a function that writes a recipe to a file and returns its path."""

    def write(recipe=None):
        path = tmp_path / "mine.yaml"
        (recipe or classify()).to_yaml(path)
        return path

    return write


def message_of(result) -> str:
    return " ".join(result.stderr.split())


def test_help_imports_nothing_heavy():
    heavy = "torch transformers peft trl datasets accelerate evaluate pandas numpy matplotlib rich.table"
    code = f"import sys, peft_recipes, peft_recipes.cli.app; print([m for m in {heavy.split()!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(found.stdout.replace("'", '"'))) <= {"rich.table"}  # typer renders its help with rich


def test_every_command_and_option_has_help():
    for name, command in get_command(app).commands.items():
        assert command.help and command.help[0].isupper(), name
        for parameter in command.params:
            assert parameter.help and parameter.help[0].isupper(), (name, parameter.name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "mnist-shfit"], "Did you mean 'mnist-shift'"),
        (["compare", "mnist-shift", "--set", "trainng.max_steps=3"], "Did you mean 'training'"),
        (["compare", "mnist-shift", "--set", "training.max_step=3"], "Did you mean 'max_steps'"),
        (["compare", "mnist-shift", "--set", "max_length"], "expected KEY=VALUE"),
        (["compare", "MINE", "--arms", "lroa"], "Did you mean 'lora'"),
        (["compare", "MINE", "--seeds", "0,x"], "expected whole numbers"),
        (["train", "MINE", "--arm", "lroa"], "Did you mean 'lora'"),
        (["plan", "MINE", "--arms", "lroa"], "Did you mean 'lora'"),
        (["compare", "MINE", "--set", "arms.lora.peft.r=0"], "whole number of 1 or more, got 0"),
        (["compare", "MINE", "--set", "arms.lora.peft.target_modules=[q_lni]"], "Nearest: q_lin"),
        (["compare", "MINE", "--set", "dataset.path=./none.csv"], "is not there"),
        (["compare", "MINE", "--set", "dataset.text=txet"], "Did you mean 'text'"),
        (["compare", "MINE", "--set", "dataset.label=lable"], "Did you mean 'label'"),
        (["compare", "MINE", "--set", "model=./none"], "no config.json there"),
        (["compare", "MINE", "--embedded"], "no embedded stand-ins"),
        (["compare", "MINE", "--output", "/dev/null/x"], "is a file"),
        (["compare", "MINE", "--output", "/proc/x"], "can't be made"),
        (["report", "."], "no comparison.json"),
        (["train", "MINE", "--arm", "lora", "--resume", "--overwrite"], "choose one"),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_2_and_writes_nothing(call, yaml, words, message, tmp_path):
    path = str(yaml())
    result = call(*[path if word == "MINE" else word for word in words])
    assert result.exit_code == 2, message_of(result)
    assert message in message_of(result)
    assert "Traceback" not in result.output + result.stderr
    assert result.stdout == ""
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\n", "is empty"),
        ("text,label\na,good\nb,bad,extra\n", "line 3"),
        ("text,label\n" + "".join(f"word {i},{i}.5\n" for i in range(200)), "make it a regression"),
    ],
)
def test_malformed_data_is_reported_before_anything_is_written(call, yaml, classify, text, message, tmp_path):
    data = tmp_path / "bad.csv"
    data.write_text(text)
    result = call("compare", yaml(classify()), "--set", f"dataset.path={data}")
    assert (result.exit_code, message in message_of(result)) == (2, True), message_of(result)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("command", [["compare"], ["train", "--arm", "lora"], ["plan"]])
def test_an_unreachable_hub_is_an_error_that_names_embedded(call, command, tmp_path):
    # All tests run with HF_HUB_OFFLINE, which acts like a machine without a network.
    result = call(command[0], "gpt2-sms-spam", *command[1:])
    assert result.exit_code == 2
    assert "--embedded" in message_of(result) and "can't be reached" in message_of(result)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_plan_lists_targets_parameters_and_memory_of_each_arm(call, yaml):
    result = call("plan", yaml(), "--json")
    plan = json.loads(result.stdout)
    assert plan["recipe"] == "tiny" and list(plan["arms"]) == ["full", "head", "lora"]
    lora = plan["arms"]["lora"]
    assert lora["steps"] == 12 and len(lora["modules"]) == 12 and "transformer.layer.0.attention.q_lin" in str(lora)
    assert lora["trainable_parameters"] == lora["adapter_parameters"] + lora["head_parameters"]
    assert lora["checkpoint_bytes"] == 4 * lora["trainable_parameters"]
    parts = lora["memory"]
    assert parts["total"] == sum(
        parts[k] for k in ("weights", "gradients", "optimizer", "activations", "freed", "libraries")
    )
    assert parts["fits"] and parts["gradients"] == 4 * lora["trainable_parameters"]
    shown = call("plan", yaml())
    assert "lora" in shown.stdout and "q_lin" in shown.stdout


def test_train_prints_one_json_document_and_writes_the_run_folder(call, yaml, tmp_path):
    result = call("train", yaml(), "--arm", "lora", "--seed", "7", "--output", "out", "--json")
    assert result.exit_code == 0, message_of(result)
    assert json.loads(result.stdout)["seed"] == 7
    folder = tmp_path / "work/out/tiny/lora/seed-7"
    assert {"run.json", "recipe.yaml", "log.jsonl", "predictions.parquet", "adapter_config.json",
            "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}  # fmt: skip
    again = call("train", yaml(), "--arm", "lora", "--seed", "7", "--output", "out")
    assert again.exit_code == 2 and "--overwrite" in message_of(again)
    kept = call("train", yaml(), "--arm", "lora", "--seed", "7", "--output", "out", "--resume")
    assert kept.exit_code == 0 and "seed 7" in kept.stdout


def test_compare_prints_the_table_the_verdict_the_report_path_and_failures(call, yaml):
    words = ("--arms", "full,lora,head", "--set", "arms.head.learning_rate=1e30", "--output", "out")
    result = call("compare", yaml(), *words)
    assert result.exit_code == 1, message_of(result)
    assert "95 %" in result.stdout and "comparison.html" in result.stdout and "Failed: head" in message_of(result)
    arms = json.loads(call("report", "out/tiny", "--json").stdout)["arms"]
    assert {name: arm["status"] for name, arm in arms.items()} == {"full": "ok", "lora": "ok", "head": "failed"}
    assert call("report", "out/tiny").exit_code == 0


def test_a_recipe_module_is_a_script_with_the_options_of_train(classify, tmp_path):
    recipe = classify()
    module = tmp_path / "mine.py"
    module.write_text(
        "from peft import LoraConfig\nfrom peft_recipes import Arm, Dataset, Recipe, main, targets\n"
        f"recipe = Recipe('mine', 'text-classification', {recipe.model!r}, Dataset({recipe.dataset.path!r}),\n"
        "    {'lora': Arm(LoraConfig(target_modules=targets('distilbert', 'attention')), learning_rate=1e-3)},\n"
        "    training={'max_steps': 2, 'use_cpu': True})\n"
        "if __name__ == '__main__':\n    main(recipe)\n"
    )
    run = warm(str(module), "--arm", "lora", "--json")
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training"]["steps"] == 2
    typo = subprocess.run(
        warm(str(module), "--arm", "lroa"), cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert typo.returncode == 2 and "Did you mean 'lora'" in typo.stderr and "Traceback" not in typo.stderr


def test_list_as_json(call):
    rows = json.loads(call("list", "--json").stdout)
    assert {"mnist-shift", "smollm2-alpaca"} <= {row["name"] for row in rows}
    assert all(row["embedded"] for row in rows)


def test_a_closed_pipe_is_no_error():
    """`peft-recipes list | head -1`: the pipe is closed before the command has written everything."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "peft_recipes", "list", "--json"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert "Traceback" not in ended.stderr and "BrokenPipe" not in ended.stderr


def test_the_version_is_that_of_the_package(call):
    shown = call("--version")
    assert shown.exit_code == 0 and importlib.metadata.version("peft_recipes") in shown.output
