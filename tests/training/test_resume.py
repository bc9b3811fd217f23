"""A run that is killed, interrupted or out of disk resumes with the same result: real signals, real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pandas
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from worker_processes import all_ended

from peft_recipes import Arm, RecipeError, compare, targets, train
from peft_recipes.errors import Terminated
from peft_recipes.hardware import device
from peft_recipes.runs import checkpoints
from peft_recipes.runs.folder import run_folder
from peft_recipes.training import stages


@pytest.fixture
def recipes(classify, instruct, prefer, translate):
    """A recipe of each task: dropout (so that random states matter), two epochs and a checkpoint every step."""

    def dropout(kind, learning_rate):
        config = LoraConfig(r=4, lora_dropout=0.1, target_modules=targets(kind, "attention"))
        return {"full": Arm(learning_rate=learning_rate / 10), "lora": Arm(config, learning_rate=learning_rate)}

    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False}
    return {
        "classification": classify(arms={**dropout("distilbert", 2e-2), "head": classify().arms["head"]},
                                   training=training, checkpoint_seconds=0),
        "sft": instruct(arms=dropout("llama", 1e-2), training=training, checkpoint_seconds=0),
        "dpo": prefer(arms=dropout("llama", 1e-2), training={**training, "disable_dropout": False},
                      checkpoint_seconds=0),
        "seq2seq": translate(arms=dropout("t5", 1e-2), training=training, checkpoint_seconds=0),
    }  # fmt: skip


def at_step(monkeypatch, number, do):
    """Call `do` once, at the end of that optimizer step."""
    log_step, done = stages.log_step, []

    def logged(log, step, *rest):
        log_step(log, step, *rest)
        if step == number and not done:
            done.append(step)
            do()

    monkeypatch.setattr(stages, "log_step", logged)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def same(first, second):
    """Assert that two runs have the same losses, figures, predictions and weights."""
    one, two = first.data, second.data
    assert one["training"]["losses"] == two["training"]["losses"]
    for key in ("steps", "tokens", "computed_tokens", "examples", "padding_share", "batches"):
        assert one["training"][key] == two["training"][key], key
    timing = ("runtime", "per_second", "epoch")
    for a, b in zip(one["training"]["validation"], two["training"]["validation"], strict=True):
        assert {k: v for k, v in a.items() if not k.endswith(timing)} == {
            k: v for k, v in b.items() if not k.endswith(timing)
        }
    for key in ("metrics", "per_class", "parameters", "checkpoint_bytes", "rows", "signature", "answers"):
        assert one[key] == two[key], key
    tables = [pandas.read_parquet(run.folder / "predictions.parquet") for run in (first, second)]
    pandas.testing.assert_frame_equal(*tables)
    for path in first.folder.glob("*.safetensors"):
        saved = load_file(path), load_file(second.folder / path.name)
        for name in saved[0]:
            torch.testing.assert_close(saved[0][name], saved[1][name], rtol=0, atol=1e-6)


# Of 12 steps to an epoch in classification, else of 4: within an epoch and, once for each task, at its end.
@pytest.mark.parametrize(
    ("task", "arm", "step"),
    [(task, arm, 3) for task in ("classification", "sft", "dpo", "seq2seq") for arm in ("lora", "full")]
    + [("sft", "lora", 4), ("dpo", "full", 4), ("seq2seq", "lora", 4)],
)
def test_an_interrupted_run_resumes_with_the_same_result(recipes, tmp_path, monkeypatch, task, arm, step):
    recipe = recipes[task].with_changes({"training": {"train_sampling_strategy": "group_by_length"}})
    uninterrupted = train(recipe, arm, output=tmp_path / "uninterrupted")
    at_step(monkeypatch, step, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, arm, output=tmp_path / "cut")
    folder = run_folder(tmp_path / "cut", recipe, arm, 0)
    kept = folder / checkpoints.FOLDER / f"checkpoint-{step}"
    names = {path.name for path in kept.iterdir()}
    assert ("model.safetensors" in names) == (arm == "full") and not (folder / "run.json").exists()
    with pytest.raises(RecipeError, match=r"unfinished run.*--resume"):
        train(recipe, arm, output=tmp_path / "cut")
    again = train(recipe, arm, output=tmp_path / "cut", resume=True)
    assert again.data["training"]["resumed_at_steps"] == [step]
    same(uninterrupted, again)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "step" in line and "stage" not in line]
    assert steps == list(range(1, uninterrupted.data["training"]["steps"] + 1))
    assert not (folder / checkpoints.FOLDER).exists()


def test_sigterm_saves_a_checkpoint_and_a_second_signal_ends_at_once(recipes, tmp_path, monkeypatch):
    recipe = recipes["classification"].with_changes({"checkpoint_seconds": 300})
    at_step(monkeypatch, 3, send(signal.SIGTERM))
    with pytest.raises(Terminated):
        train(recipe, "lora", output=tmp_path)
    folder = run_folder(tmp_path, recipe, "lora", 0) / checkpoints.FOLDER
    assert [p.name for p in folder.iterdir()] == ["checkpoint-3"]

    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    at_step(monkeypatch, 5, twice)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "lora", output=tmp_path, resume=True)
    assert [p.name for p in folder.iterdir()] == ["checkpoint-3"]


def test_a_run_killed_in_evaluation_does_not_train_again(recipes, tmp_path, monkeypatch):
    """Trainer by itself would train a step beyond the last one."""
    recipe = recipes["sft"].with_changes({"training": {"max_steps": 6}})  # midway through an epoch
    uninterrupted = train(recipe, "lora", output=tmp_path / "uninterrupted")
    evaluate, steps = stages._evaluate, []

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "lora", output=tmp_path / "cut")
    monkeypatch.setattr(stages, "_evaluate", evaluate)
    monkeypatch.setattr(stages, "log_step", lambda log, step, *_: steps.append(step))
    same(uninterrupted, train(recipe, "lora", output=tmp_path / "cut", resume=True))
    assert steps == []


@pytest.mark.parametrize("harm", ["shortened", "no-json", "gone", "of-another-recipe"])
def test_a_broken_checkpoint_is_skipped_with_a_note(recipes, tmp_path, monkeypatch, harm):
    recipe = recipes["classification"]
    at_step(monkeypatch, 3, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "lora", output=tmp_path)
    kept = run_folder(tmp_path, recipe, "lora", 0) / checkpoints.FOLDER / "checkpoint-3"
    if harm == "shortened":
        weights = kept / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
    elif harm == "no-json":
        (kept / "trainer_state.json").write_text("{" * (kept / "trainer_state.json").stat().st_size)
    elif harm == "gone":
        (kept / "optimizer.pt").unlink()
    else:
        recipe = recipe.with_changes({"training": {"weight_decay": 0.2}})
    data = train(recipe, "lora", output=tmp_path, resume=True).data
    assert data["training"]["resumed_at_steps"] == [] and data["training"]["steps"] == 24
    assert any("checkpoint-3 is broken and was skipped" in n for n in data["notes"]) == (harm != "of-another-recipe")
    assert any("had 3 steps of another recipe, data or code" in n for n in data["notes"]) == (
        harm == "of-another-recipe"
    )


def test_a_full_disk_is_reported_and_the_last_checkpoint_kept(recipes, tmp_path, monkeypatch):
    recipe = recipes["classification"]
    uninterrupted = train(recipe, "full", output=tmp_path / "uninterrupted")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])))
    try:
        with pytest.raises(checkpoints.DiskFull, match=r"No room .*step 2 is complete.*Make room"):
            train(recipe, "full", output=tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = run_folder(tmp_path / "cut", recipe, "full", 0)
    assert [p.name for p in (folder / checkpoints.FOLDER).iterdir()] == ["checkpoint-2"]
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    again = train(recipe, "full", output=tmp_path / "cut", resume=True)
    assert again.data["training"]["resumed_at_steps"] == [2]
    same(uninterrupted, again)


def test_a_linear_probe_on_features_starts_again(recipes, tmp_path, monkeypatch):
    recipe = recipes["classification"]
    uninterrupted = train(recipe, "head", output=tmp_path / "uninterrupted")
    at_step(monkeypatch, 3, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "head", output=tmp_path / "cut")
    again = train(recipe, "head", output=tmp_path / "cut", resume=True)
    assert again.data["training"]["resumed_at_steps"] == []
    same(uninterrupted, again)


@contextlib.contextmanager
def worker(recipe, arm, output, **options):
    """Start the process of one run as a comparison does; yield it with its log."""
    recipe.to_yaml(output / "recipe.yaml")
    command = [
        sys.executable,
        "-m",
        "peft_recipes.comparison.worker",
        str(output / "recipe.yaml"),
        arm,
        "0",
        str(output),
    ]
    log = run_folder(output, recipe, arm, 0) / "log.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as process:
        try:
            yield process, log
        finally:
            process.kill()


def wait_for_step(process, log, step):
    """Return when the run has logged that step."""
    while process.poll() is None:
        if log.is_file() and f'"step": {step},' in log.read_text():
            return
        threading.Event().wait(0.01)
    raise AssertionError(process.stderr.read().decode())


def test_a_killed_process_resumes_from_its_last_complete_checkpoint(recipes, tmp_path):
    recipe = recipes["classification"]
    uninterrupted = train(recipe, "lora", output=tmp_path / "uninterrupted")
    for step in (6, 18):
        with worker(recipe, "lora", tmp_path) as (process, log):
            wait_for_step(process, log, step)
            process.send_signal(signal.SIGKILL)
    with worker(recipe, "lora", tmp_path) as (process, log):
        assert process.wait() == 0, process.stderr.read().decode()
    again = train(recipe, "lora", output=tmp_path, resume=True)
    assert [step - at for step, at in zip((6, 18), again.data["training"]["resumed_at_steps"], strict=True)] <= [1, 1]
    same(uninterrupted, again)


def test_a_worker_ends_with_the_process_that_started_it(recipes, tmp_path):
    recipe = recipes["sft"].with_changes({"training": {"num_train_epochs": 200}, "checkpoint_seconds": 300})
    with worker(recipe, "lora", tmp_path, stdin=subprocess.PIPE) as (process, log):
        wait_for_step(process, log, 2)
        process.stdin.close()  # as it is closed when its parent is killed
        assert process.wait() == 143
    assert len(list((log.parent / checkpoints.FOLDER).glob("checkpoint-*"))) == 1


HOLD = "import sys, pathlib\nfrom peft_recipes.runs.lock import locked\n" \
       "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.readline()\n"  # fmt: skip


def test_a_locked_folder_names_its_writer_or_is_waited_for(recipes, tmp_path):
    from peft_recipes.runs.lock import locked

    folder = tmp_path / recipes["sft"].name
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match=rf"another process \(process {other.pid}, since .*--wait"):
            compare(recipes["sft"], ["lora"], output=tmp_path)
        other.stdin.write("\n")
        other.stdin.flush()
        with locked(folder, wait=True):
            assert f"process {os.getpid()}" in (folder / ".lock-holder").read_text()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()  # a lock of a dead process stops nobody
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_silent_worker_is_reported(recipes, tmp_path, monkeypatch):
    from peft_recipes.comparison import orders
    from peft_recipes.comparison.pool import LocalPool

    monkeypatch.setattr(orders, "SILENT_SECONDS", 0)
    progress = []
    recipe = recipes["classification"].with_changes({"training": {"max_steps": 2}})
    recipe.to_yaml(tmp_path / "r.yaml")
    order = orders.Order(tmp_path, recipe, ("lora", 0), tmp_path / "r.yaml", on_progress=progress.append)
    with LocalPool() as local:
        local.submit(order)
        assert list(all_ended(local)) == [order]
    assert progress[-1].state == "ok" and any(
        news.silent_seconds >= 0 and news.state == "running" for news in progress[1:]
    )


def test_a_resumed_run_keeps_its_precision(recipes, tmp_path, monkeypatch):
    recipe = recipes["classification"]
    recipe = dataclasses.replace(recipe, training={k: v for k, v in recipe.training.items() if k != "bf16"})
    at_step(monkeypatch, 3, send(signal.SIGINT))
    monkeypatch.setattr(device, "bf16_speedup", lambda: 0.01)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "lora", output=tmp_path)
    monkeypatch.setattr(device, "bf16_speedup", lambda: 100.0)
    data = train(recipe, "lora", output=tmp_path, resume=True).data
    assert data["training"]["resumed_at_steps"] == [3] and data["environment"]["precision"] == "fp32"
