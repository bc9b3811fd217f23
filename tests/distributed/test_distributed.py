"""Two ranks over gloo, under DDP and FSDP2: the losses, weights and predictions of one process; kills and resuming.

A launch takes seconds, so each trains many runs: `distributed_runs.py` trains a list of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pandas
import pytest
import transformers
from benchmark_files import choices
from peft import AdaLoraConfig, LoraConfig, PeftModel
from problem_types import recipe_of, write_rows
from safetensors.torch import load_file
from tagged import tag_recipe, tagged, written
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from two_ranks import assert_same, launch, run_of
from warm_python import REAL
from worker_processes import workers

from peft_recipes import Arm, Dataset, RecipeError, compare, targets, train
from peft_recipes.distributed.batches import check_shardable
from peft_recipes.distributed.launch import launch_files
from peft_recipes.runs.checkpoints import FOLDER as CHECKPOINTS
from peft_recipes.runs.folder import run_folder

RUNS = [("sft", "lora"), ("sft", "full"), ("classes", "lora"), ("classes", "full"), ("classes", "head"),
        ("text", "full"), ("pairs", "lora"), ("padded-pairs", "full"), ("images", "head"), ("several", "lora"),
        ("number", "full"), ("tags", "lora"), ("tags", "head")]  # fmt: skip
ONE_COPY = [
    ("images", "full"),
    ("classes", "adalora"),
    ("sft", "adalora"),
    ("padded-pairs", "adalora"),
    ("seq2seq", "lora"),
    ("seq2seq", "full"),
]  # not under FSDP2
KINDS = {"ddp": "DDP", "fsdp2": "FSDP2"}


@pytest.fixture(scope="module")
def without_dropout(tiny, tmp_path_factory):
    """The tiny DistilBERT without dropout, whose random draws differ by rank."""
    folder = tmp_path_factory.mktemp("base") / "distilbert"
    shutil.copytree(tiny("distilbert"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def recipes(without_dropout, tiny, reviews, questions, preferences, translate, root):
    """A recipe for each task, with indivisible splits; a step is 8 examples, in classification two batches of 4."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets("distilbert", "all-linear"))
    attention = LoraConfig(r=4, target_modules=targets("llama", "attention"))
    common = {"checkpoint_seconds": 300, "threads": 1}
    from peft_recipes import Recipe

    # No rank is removed before the last steps: the penalty on top of the loss is what differs from LoRA.
    adalora = {
        kind: Arm(AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=8, tfinal=1, orth_reg_weight=0.5,
                                target_modules=targets(kind, "attention")), learning_rate=1e-3)
        for kind in ("distilbert", "llama")
    }  # fmt: skip
    sft = Recipe(
        name="sft", task="sft", model=str(tiny("llama")), max_length=48, metric="f1",
        dataset=Dataset(str(questions), train=33, validation=5, test=7),  # 4 steps of 8, one of 1
        # epsilon: with AdamW's default, 1e-8, a gradient of rounding errors alone makes a full step.
        training={"num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 2,
                  "use_cpu": True, "bf16": False, "adam_epsilon": 1e-5},
        arms={"full": Arm(learning_rate=1e-3), "lora": Arm(attention, learning_rate=1e-2),
              "adalora": adalora["llama"]}, **common)  # fmt: skip
    pairs = {
        "task": "dpo",
        "metric": None,
        "dataset": Dataset(str(preferences), train=33, validation=5, test=7),
        "max_length": 40,
    }
    for number in range(24):
        save_picture(root / "pictures" / ("dark" if number % 2 else "light") / f"{number}.png", number)
    transformers.set_seed(0)
    transformers.ViTModel(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=7,
    )).save_pretrained(root / "vit")  # fmt: skip
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(root / "vit")
    labels = {  # 5 steps of 8 and one of 5: a rank without an example left computes a masked one
        kind: recipe_of(kind, write_rows(kind, root), without_dropout).with_changes({
            "dataset": {"train": 45, "validation": 9, "test": 13},
            "training": {"per_device_eval_batch_size": 4, "adam_epsilon": 1e-5}})
        for kind in ("several", "number")
    }  # fmt: skip
    return {
        **labels,
        "sft": sft,
        "text": Recipe(**{**vars(sft), "name": "text", "task": "language-modeling", "metric": None,
                          "benchmarks": [str(choices(root / "benchmark", count=7))],
                          "dataset": Dataset(str(reviews), train=19, validation=5, test=7)}),
        "pairs": Recipe(**{**vars(sft), **pairs, "name": "pairs"}),
        "padded-pairs": Recipe(**{
            **vars(sft), **pairs, "name": "padded-pairs", "batches": "padded",
            "dataset": Dataset(str(preferences), train=35, validation=5, test=7),
            "training": {**sft.training, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}}),
        "seq2seq": translate(
            name="seq2seq", dataset=Dataset(translate().dataset.path, train=33, validation=5, test=7),
            training={**sft.training, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, **common),
        "images": Recipe(
            name="images", task="image-classification", model=str(root / "vit"),
            dataset=Dataset(str(root / "pictures"), image="image", label="label", train=13, validation=5, test=6),
            training={"num_train_epochs": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2,
                      "use_cpu": True, "bf16": False, "adam_epsilon": 1e-5},
            arms={"full": Arm(learning_rate=1e-3), "head": Arm("head", learning_rate=1e-2)}, **common),
        "classes": Recipe(
            name="classes", task="text-classification", model=str(without_dropout), max_length=16,
            dataset=Dataset(str(reviews), train=43, validation=17, test=37),
            training={"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                      "per_device_eval_batch_size": 4, "use_cpu": True, "bf16": False,
                      "train_sampling_strategy": "group_by_length"},
            arms={"full": Arm(learning_rate=5e-3), "head": Arm("head", learning_rate=1e-2),
                  "lora": Arm(lora, learning_rate=1e-2), "adalora": adalora["distilbert"]}, **common),
        "tags": tag_recipe(
            without_dropout, written(root / "tags.jsonl", tagged(80)), max_length=16,
            dataset=Dataset(str(root / "tags.jsonl"), train=43, validation=13, test=17),
            training={"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                      "per_device_eval_batch_size": 4, "use_cpu": True, "bf16": False, "adam_epsilon": 1e-5},
            **common),
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(recipes, root):
    """The runs trained by one process, and an interrupted one for two ranks to resume."""
    made = {(name, arm): train(recipes[name], arm, output=root / "one") for name, arm in [*RUNS, *ONE_COPY]}
    for kind in KINDS:
        interrupted_here(recipes["sft"], root / f"one-then-{kind}")
    return made


def save_picture(path: Path, number: int) -> None:
    """A picture of noise, dark or light as its folder says."""
    from PIL import Image

    level = 60 if path.parent.name == "dark" else 180
    pixels = np.random.default_rng(number).integers(level, level + 60, (28, 28, 3)).astype("uint8")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def interrupted_here(recipe, output, step=3):
    """Interrupt a run of this process after a step; its checkpoint stays."""
    from distributed_runs import signal_at_step

    signal_at_step(0, step, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "lora", output=output)


@pytest.fixture(scope="module", params=KINDS)
def two(request, recipes, one, root):
    """All runs trained by two ranks, and interrupted ones, one of which they resume."""
    kind = request.param
    yaml = {name: str(root / f"{name}.yaml") for name in recipes}
    for name, recipe in recipes.items():
        recipe.to_yaml(Path(yaml[name]))
    cut = {"signal": [1, 3, signal.SIGINT]}  # to rank 1
    runs = [*RUNS, *ONE_COPY] if kind == "ddp" else RUNS
    jobs = [[yaml[name], arm, str(root / kind), {}] for name, arm in runs]
    jobs += [[yaml["sft"], "base", str(root / kind), {}]]
    jobs += [[yaml["sft"], "lora", str(root / f"{kind}-again"), cut]]
    jobs += [[yaml["sft"], "lora", str(root / f"{kind}-again"), {"resume": True}]]
    jobs += [[yaml["sft"], "lora", str(root / f"{kind}-then-one"), cut]]
    jobs += [[yaml["classes"], "full", str(root / f"{kind}-then-one"), cut]]
    jobs += [[yaml["sft"], "lora", str(root / f"one-then-{kind}"), {"resume": True}]]
    return kind, launch(root, kind, kind, jobs)


@pytest.mark.parametrize(("name", "arm"), [*RUNS, *ONE_COPY])
def test_two_ranks_train_what_one_process_does(one, two, recipes, root, name, arm):
    kind, _ = two
    if kind != "ddp" and (name, arm) in ONE_COPY:
        with pytest.raises(RecipeError, match="not with FSDP2"):
            check_shardable(recipes[name], arm, KINDS[kind])
        return
    run = run_of(root, kind, recipes[name], arm)
    assert run is not None and run.ok
    assert_same(one[name, arm], run)
    assert run.data["training"]["batches"] == one[name, arm].data["training"]["batches"]
    for split, metrics in one[name, arm].metrics.items():
        assert run.metrics[split] == pytest.approx(metrics, abs=1e-5), split


def test_the_base_is_evaluated_once_per_example(two, recipes, root, one):
    kind, _ = two
    folders = run_of(root, kind, recipes["sft"], "base").folder, one["sft", "lora"].folder
    ids, expected = (sorted(pandas.read_parquet(folder / "predictions.parquet")["id"]) for folder in folders)
    assert ids == expected and len(ids) == 7


def test_the_saved_adapter_is_complete_and_loads_without_a_launcher(two, recipes, root, tiny):
    kind, _ = two
    for name, auto, base in (
        ("sft", AutoModelForCausalLM, "llama"),
        ("classes", AutoModelForSequenceClassification, "distilbert"),
    ):
        folder = run_of(root, kind, recipes[name], "lora").folder
        model = PeftModel.from_pretrained(auto.from_pretrained(tiny(base), num_labels=2), folder)
        saved = load_file(folder / "adapter_model.safetensors")
        wanted = {k: v.shape for k, v in model.state_dict().items() if "lora_" in k or "modules_to_save" in k}
        assert {k: v.shape for k, v in saved.items()} == {
            k.replace(".modules_to_save.default", "").replace(".default", ""): v for k, v in wanted.items()
        }
        assert all(float(tensor.abs().max()) > 0 for tensor in saved.values())
    assert any("classifier" in key for key in saved)  # modules_to_save


def test_memory_and_speed_are_reported_per_rank_and_in_total(two, recipes, root):
    kind, _ = two
    data = run_of(root, kind, recipes["sft"], "lora").data
    figures, where = data["training"], data["environment"]
    assert (where["processes"], where["machines"], where["distributed"]) == (2, 1, KINDS[kind])
    each = figures["processes"]
    assert len(each) == 2 and figures["peak_memory_bytes"] == max(p["peak_memory_bytes"] for p in each)
    assert figures["peak_memory_bytes_sum"] == sum(p["peak_memory_bytes"] for p in each)
    assert sum(p["tokens"] for p in each) == figures["tokens"] and figures["seconds"] == max(p["seconds"] for p in each)
    assert any("Trained by 2 processes" in note and kind[:3].upper() in note for note in data["notes"])
    assert run_of(root, kind, recipes["classes"], "head").data["environment"]["distributed"] == "DDP"


def test_only_rank_0_prints(two):
    _, done = two
    text = done.stdout + done.stderr
    assert text.count("Ending after this step") == 3  # three interruptions, printed by rank 0 alone
    assert "Traceback" not in text and "zombie" not in text


def test_an_interrupted_run_resumes_on_as_many_ranks_and_on_others(one, two, recipes, root):
    kind, _ = two
    again = run_of(root, f"{kind}-again", recipes["sft"], "lora")
    assert again.data["training"]["resumed_at_steps"] == [3]
    assert_same(one["sft", "lora"], again)
    more = run_of(root, f"one-then-{kind}", recipes["sft"], "lora")
    assert more.data["training"]["resumed_at_steps"] == [3]
    assert_same(one["sft", "lora"], more)
    for name, arm in (("sft", "lora"), ("classes", "full")):
        fewer = root / f"{kind}-then-one"
        kept = run_folder(fewer, recipes[name], arm, 0) / CHECKPOINTS / "checkpoint-3"
        files = {path.name for path in kept.iterdir()}
        assert {"optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files
        assert ("model.safetensors" in files) == (arm == "full")  # the adapter, not the base
        assert ("adapter_model.safetensors" in files) == (arm == "lora")
        done = train(recipes[name], arm, output=fewer, resume=True)
        assert done.data["training"]["resumed_at_steps"] == [3]
        assert_same(one[name, arm], done)


def test_a_killed_rank_leaves_a_checkpoint_to_resume_from(one, recipes, root):
    recipe = recipes["sft"].with_changes({"checkpoint_seconds": 0})
    recipe.to_yaml(root / "killed.yaml")
    job = [str(root / "killed.yaml"), "lora", str(root / "killed"), {"signal": [1, 4, signal.SIGKILL]}]
    killed = launch(root, "killed", "ddp", [job], check=False)
    assert killed.returncode != 0 and killed.stdout.count("ended without a message") == 1, killed.stdout + killed.stderr
    left = run_of(root, "killed", recipe, "lora")
    assert left.data["status"] == "failed" and "Another process of this run has ended" in left.data["error"]
    done = train(recipe, "lora", output=root / "killed", resume=True)
    assert done.data["training"]["resumed_at_steps"] in ([3], [4])
    assert_same(one["sft", "lora"], done)


def test_ranks_that_wait_for_each_other_fail_and_say_where(recipes, root):
    """Rank 0 calls a collective once more than rank 1, so that each waits for the other in the next step.

    `launch` checks that no process is left.
    """
    recipes["sft"].to_yaml(root / "hangs.yaml")
    jobs = [[str(root / "hangs.yaml"), "lora", str(root / "hangs"), {"diverge": 2}]]
    done = launch(root, "hangs", "ddp", jobs, check=False, PEFT_RECIPES_HANG_SECONDS="2")
    assert done.returncode != 0
    run = run_of(root, "hangs", recipes["sft"], "lora")
    assert run.data["status"] == "failed"
    for text in (run.data["error"], done.stdout):
        assert re.search(
            r"RanksHang: .* process 0 for \d s in all_reduce_max \(training/callbacks.py:\d+, in on_step_end", text
        ), text
        assert re.search(r"; process 1 for \d s in all_gather \(training/fit.py:\d+, in ", text), text
    assert all(f"Process {rank} waits here" in done.stderr for rank in (0, 1)), done.stderr


def test_a_failure_on_every_rank_is_printed_once(recipes, root):
    """The failure is a loss that is not finite."""
    recipes["sft"].with_changes({"arms": {"full": {"learning_rate": 1e30}}}).to_yaml(root / "fails.yaml")
    started = [REAL, "-m", "accelerate.commands.launch", "--config_file", str(launch_files()["ddp"]), "-m"]
    command = [*started, "peft_recipes", "train", str(root / "fails.yaml"), "--arm", "full", "--output"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(root / "fails")], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("The run failed in process ") == 1
    assert done.stderr.count("FloatingPointError: The loss") == 1
    run = run_of(root, "fails", recipes["sft"], "full")
    assert run.data["status"] == "failed" and "FloatingPointError: The loss is" in run.data["error"]


def test_a_comparison_retrains_runs_of_another_number_of_processes(recipes, root):
    events = []
    made = compare(recipes["sft"], ["lora"], output=root / "compared", launch="ddp", on_progress=events.append)
    assert made.failed == [] and made.data["environment"]["processes"] == 2
    assert any("2 processes" in note for note in made.data["notes"])
    assert {event.state for event in events if event.job == ("lora", 0)} == {"running", "ok"}
    states = {}

    def interrupt(event):
        states[event.job] = event.state
        if event.state == "running":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # one process trains it again
        compare(recipes["sft"], ["lora"], output=root / "compared", on_progress=interrupt)
    assert list(states.values())[-1] == "running"
    assert workers() == []


def test_collectives_of_one_process_return_its_own_values():
    from peft_recipes.distributed import processes

    error = ValueError("mine")
    assert processes.report_failure(error) is error and processes.first_failure() is None
    assert processes.all_gather(3) == [3] and processes.from_rank_zero(lambda: 4) == 4
    assert processes.all_reduce_max(5, 6) == [5, 6]
