"""Two real processes over gloo, DDP and FSDP2: the same losses, weights and predictions as one; killed, resumed, told.

Each launch costs seconds, so a few do many runs: `distributed_runs.py` trains a list of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_recipes import Arm, Dataset, compare, targets, train
from peft_recipes.distributed.launch import launch_files
from peft_recipes.distributed.processes import Elsewhere
from peft_recipes.runs.checkpoints import FOLDER as CHECKPOINTS
from peft_recipes.runs.folder import run_folder

RUNS = [("sft", "lora"), ("sft", "full"), ("classes", "lora"), ("classes", "full"), ("classes", "head")]
KINDS = {"ddp": "DDP", "fsdp2": "FSDP2"}


@pytest.fixture(scope="module")
def without_dropout(tiny, tmp_path_factory):
    """The tiny DistilBERT, which drops nothing: processes draw places of their own, and no two runs would be equal."""
    folder = tmp_path_factory.mktemp("base") / "distilbert"
    shutil.copytree(tiny("distilbert"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def recipes(without_dropout, tiny, reviews, questions):
    """Two recipes whose splits divide by nothing; a step is 8 examples, in classification two batches of 4."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets("distilbert", "all-linear"))
    attention = LoraConfig(r=4, target_modules=targets("llama", "attention"))
    common = {"checkpoint_seconds": 300, "threads": 1}
    from peft_recipes import Recipe

    return {
        "classes": Recipe(
            name="classes", task="text-classification", model=str(without_dropout), max_length=16,
            dataset=Dataset(str(reviews), train=43, validation=17, test=37),
            training={"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                      "per_device_eval_batch_size": 4, "use_cpu": True, "bf16": False,
                      "train_sampling_strategy": "group_by_length"},
            arms={"full": Arm(learning_rate=5e-3), "head": Arm("head", learning_rate=1e-2),
                  "lora": Arm(lora, learning_rate=1e-2)}, **common),
        "sft": Recipe(
            name="sft", task="sft", model=str(tiny("llama")), max_length=48,
            dataset=Dataset(str(questions), train=33, validation=5, test=7),  # 4 steps of 8, one of 1
            # epsilon: by AdamW's own, 1e-8, a gradient that is nothing but rounding makes a whole step.
            training={"num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 2,
                      "use_cpu": True, "bf16": False, "adam_epsilon": 1e-5},
            arms={"full": Arm(learning_rate=1e-3), "lora": Arm(attention, learning_rate=1e-2)}, **common),
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(recipes, place):
    """The runs in this process alone; and one that was interrupted, to be gone on with by two."""
    made = {(name, arm): train(recipes[name], arm, output=place / "one") for name, arm in RUNS}
    for kind in KINDS:
        interrupted_here(recipes["sft"], place / f"one-then-{kind}")
    return made


def interrupted_here(recipe, output, step=3):
    """A run of this process that is interrupted after a step, with its checkpoint."""
    from distributed_runs import at_step

    at_step(0, step, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "lora", output=output)


def launch(place, name, config, jobs, check=True):
    """The jobs under `accelerate launch`; returns what was said. No process is left, whatever happens."""
    file = place / f"{name}.json"
    file.write_text(json.dumps(jobs))
    script = str(Path(__file__).parents[1] / "distributed_runs.py")
    command = ["-m", "accelerate.commands.launch", "--config_file", str(launch_files()[config]), script, str(file)]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(file) in (p.info["cmdline"] or [])]
    assert left == []
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", params=KINDS)
def two(request, recipes, one, place):
    """All runs by two processes, and: interrupted ones, one of which the same two go on with."""
    kind = request.param
    yaml = {name: str(place / f"{name}.yaml") for name in recipes}
    for name, recipe in recipes.items():
        recipe.to_yaml(Path(yaml[name]))
    cut = {"signal": [1, 3, signal.SIGINT]}  # to the process that is not the main one
    jobs = [[yaml[name], arm, str(place / kind), {}] for name, arm in RUNS]
    jobs += [[yaml["sft"], "base", str(place / kind), {}]]
    jobs += [[yaml["sft"], "lora", str(place / f"{kind}-again"), cut]]
    jobs += [[yaml["sft"], "lora", str(place / f"{kind}-again"), {"resume": True}]]
    jobs += [[yaml["sft"], "lora", str(place / f"{kind}-then-one"), cut]]
    jobs += [[yaml["classes"], "full", str(place / f"{kind}-then-one"), cut]]
    jobs += [[yaml["sft"], "lora", str(place / f"one-then-{kind}"), {"resume": True}]]
    return kind, launch(place, kind, kind, jobs)


def run_of(place, output, recipe, arm):
    from peft_recipes.runs.folder import read_run

    return read_run(run_folder(place / output, recipe, arm, 0))


def same(first, second):
    """Losses step by step, final weights and every prediction, to 1e-5; every other figure that is no clock's."""
    one, two = first.data["training"], second.data["training"]
    assert [s for s, _ in one["losses"]] == [s for s, _ in two["losses"]]
    torch.testing.assert_close(
        torch.tensor([loss for _, loss in one["losses"]]), torch.tensor([loss for _, loss in two["losses"]]),
        rtol=0, atol=1e-5,
    )  # fmt: skip
    for key in ("steps", "tokens", "examples"):
        assert one[key] == two[key], key
    for file in first.folder.glob("*.safetensors"):
        if file.name.startswith("verification"):
            continue
        ours, theirs = load_file(file), load_file(second.folder / file.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)
            assert theirs[name].abs().sum() > 0 or tensor.abs().sum() == 0, name
    tables = [pandas.read_parquet(run.folder / "predictions.parquet") for run in (first, second)]
    assert list(tables[0]["id"]) == list(tables[1]["id"]) and tables[1]["id"].is_unique
    pandas.testing.assert_frame_equal(*tables, check_exact=False, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "arm"), RUNS)
def test_two_processes_train_what_one_does(one, two, recipes, place, name, arm):
    kind, _ = two
    run = run_of(place, kind, recipes[name], arm)
    assert run is not None and run.ok
    same(one[name, arm], run)
    assert run.data["training"]["batches"] == one[name, arm].data["training"]["batches"]
    for split, metrics in one[name, arm].metrics.items():
        assert run.metrics[split] == pytest.approx(metrics, abs=1e-5), split


def test_the_base_is_evaluated_once_an_example(two, recipes, place, one):
    kind, _ = two
    rows = pandas.read_parquet(run_of(place, kind, recipes["sft"], "base").folder / "predictions.parquet")
    assert sorted(rows["id"]) == sorted(
        pandas.read_parquet(one["sft", "lora"].folder / "predictions.parquet")["id"]
    ) and len(rows) == 7  # fmt: skip


def test_the_saved_adapter_is_whole_and_loads_without_a_launcher(two, recipes, place, tiny):
    kind, _ = two
    for name, auto, base in (
        ("sft", AutoModelForCausalLM, "llama"),
        ("classes", AutoModelForSequenceClassification, "distilbert"),
    ):
        folder = run_of(place, kind, recipes[name], "lora").folder
        model = PeftModel.from_pretrained(auto.from_pretrained(tiny(base), num_labels=2), folder)
        saved = load_file(folder / "adapter_model.safetensors")
        wanted = {k: v.shape for k, v in model.state_dict().items() if "lora_" in k or "modules_to_save" in k}
        assert {k: v.shape for k, v in saved.items()} == {
            k.replace(".modules_to_save.default", "").replace(".default", ""): v for k, v in wanted.items()
        }
        assert all(float(tensor.abs().max()) > 0 for tensor in saved.values())
    assert any("classifier" in key for key in saved)  # modules_to_save


def test_memory_and_speed_are_told_by_process_and_together(two, recipes, place):
    kind, _ = two
    data = run_of(place, kind, recipes["sft"], "lora").data
    figures, where = data["training"], data["environment"]
    assert (where["processes"], where["machines"], where["distributed"]) == (2, 1, KINDS[kind])
    each = figures["processes"]
    assert len(each) == 2 and figures["peak_memory_bytes"] == max(p["peak_memory_bytes"] for p in each)
    assert figures["peak_memory_bytes_sum"] == sum(p["peak_memory_bytes"] for p in each)
    assert sum(p["tokens"] for p in each) == figures["tokens"] and figures["seconds"] == max(p["seconds"] for p in each)
    assert any("Trained by 2 processes" in note and kind[:3].upper() in note for note in data["notes"])
    assert run_of(place, kind, recipes["classes"], "head").data["environment"]["distributed"] == "DDP"


def test_only_the_main_process_speaks(two):
    _, said = two
    text = said.stdout + said.stderr
    assert text.count("Ending after this step") == 3  # of three interruptions, by the main process alone
    assert "Traceback" not in text and "zombie" not in text


def test_an_interrupted_run_goes_on_with_as_many_processes_and_with_others(one, two, recipes, place):
    kind, _ = two
    again = run_of(place, f"{kind}-again", recipes["sft"], "lora")
    assert again.data["training"]["resumed_at_steps"] == [3]
    same(one["sft", "lora"], again)
    more = run_of(place, f"one-then-{kind}", recipes["sft"], "lora")
    assert more.data["training"]["resumed_at_steps"] == [3]
    same(one["sft", "lora"], more)
    for name, arm in (("sft", "lora"), ("classes", "full")):
        fewer = place / f"{kind}-then-one"
        kept = run_folder(fewer, recipes[name], arm, 0) / CHECKPOINTS / "checkpoint-3"
        files = {path.name for path in kept.iterdir()}
        assert {"optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files
        assert ("model.safetensors" in files) == (arm == "full")  # the adapter, not the base
        assert ("adapter_model.safetensors" in files) == (arm == "lora")
        done = train(recipes[name], arm, output=fewer, resume=True)
        assert done.data["training"]["resumed_at_steps"] == [3]
        same(one[name, arm], done)


def test_a_process_that_is_killed_leaves_a_checkpoint_to_go_on_from(one, recipes, place):
    recipe = recipes["sft"].with_changes({"checkpoint_seconds": 0})
    recipe.to_yaml(place / "killed.yaml")
    job = [str(place / "killed.yaml"), "lora", str(place / "killed"), {"signal": [1, 4, signal.SIGKILL]}]
    said = launch(place, "killed", "ddp", [job], check=False)
    assert said.returncode != 0 and said.stdout.count("ended without a word") == 1, said.stdout + said.stderr
    left = run_of(place, "killed", recipe, "lora")
    assert left.data["status"] == "failed" and "Another process of this run has ended" in left.data["error"]
    done = train(recipe, "lora", output=place / "killed", resume=True)
    assert done.data["training"]["resumed_at_steps"] in ([3], [4])
    same(one["sft", "lora"], done)


def test_a_failure_in_any_process_ends_all_and_is_said_once(recipes, place):
    """A loss that is not finite, which every process sees."""
    recipes["sft"].with_changes({"arms": {"full": {"learning_rate": 1e30}}}).to_yaml(place / "fails.yaml")
    started = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_files()["ddp"]), "-m"]
    command = [*started, "peft_recipes", "train", str(place / "fails.yaml"), "--arm", "full", "--output"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(place / "fails")], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.count("The run failed in process ") == 1 and done.stderr.count("FloatingPointError: The loss") == 1
    )
    run = run_of(place, "fails", recipes["sft"], "full")
    assert run.data["status"] == "failed" and "FloatingPointError: The loss is" in run.data["error"]


def test_a_comparison_launches_its_runs_and_keeps_those_of_as_many_processes(recipes, place):
    told = []
    made = compare(recipes["sft"], ["lora"], output=place / "compared", launch="ddp", on_progress=told.append)
    assert made.failed == [] and made.data["environment"]["processes"] == 2
    assert any("2 processes" in note for note in made.data["notes"])
    assert {news.state for news in told if news.job == ("lora", 0)} == {"running", "ok"}
    states = {}

    def tell(news):
        states[news.job] = news.state
        if news.state == "running":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # trained anew by one process: another number, other figures
        compare(recipes["sft"], ["lora"], output=place / "compared", on_progress=tell)
    assert list(states.values())[-1] == "running"
    assert not [p for p in psutil.Process().children(recursive=True) if "peft_recipes.comparison.worker" in p.cmdline()]


def test_elsewhere_is_no_error_of_a_single_process():
    from peft_recipes.distributed import processes

    error = ValueError("mine")
    assert processes.failed(error) is error and processes.failure() is None
    assert processes.gathered(3) == [3] and processes.from_main(lambda: 4) == 4 and processes.largest(5, 6) == [5, 6]
    assert issubclass(Elsewhere, Exception)
