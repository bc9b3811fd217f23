"""A run that pauses between chunks has the losses, weights, metrics and predictions of one that does not."""

from __future__ import annotations

import json

import pandas
import pytest
from equal_runs import same
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig

from peft_recipes import Arm, RecipeError, train
from peft_recipes.runs.folder import run_folder
from peft_recipes.training import stages

UNTIMED = ("reload", "merge", "fresh-process")  # checks that reload what is compared here
TARGETS = {"classify": ["q_lin", "v_lin"], "instruct": ["q_proj", "v_proj"]}


def arm(name: str, kind: str) -> Arm:
    targets = TARGETS[kind]
    methods = {
        "lora": LoraConfig(r=4, lora_dropout=0.1, target_modules=targets),
        "pissa": LoraConfig(r=4, init_lora_weights="pissa", target_modules=targets),
        "olora": LoraConfig(r=4, init_lora_weights="olora", target_modules=targets),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=targets),
        "ia3": IA3Config(target_modules=targets, feedforward_modules=[]),
        "prompt-tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=12, tinit=2, tfinal=4, target_modules=targets),
    }
    return Arm(methods.get(name, name), learning_rate=5e-3 if name == "full" else 2e-2)


def recipe_of(request, kind: str, name: str, **training):
    make = request.getfixturevalue(kind)
    batch = {"per_device_train_batch_size": 16 if kind == "classify" else 8, "num_train_epochs": 2}
    training = {**make().training, **batch, **training}
    return make(arms={name: arm(name, kind)}, training=training, skip_checks=list(UNTIMED))


def chunked(recipe, name, output, pauses):
    """Train with these pauses; return the runs that each call returned."""
    return [train(recipe, name, output=output, resume=True, pause_at=pause) for pause in (*pauses, None)]


CASES = [
    ("classify", "full", {}),
    ("classify", "lora", {}),
    ("classify", "pissa", {}),
    ("classify", "ia3", {}),
    ("classify", "lora", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}),
    ("classify", "lora", {"load_best_model_at_end": True, "greater_is_better": True, "save_total_limit": 1}),
    ("instruct", "full", {}),
    ("instruct", "olora", {}),
    ("instruct", "dora", {}),
    ("instruct", "prompt-tuning", {}),
]


@pytest.mark.parametrize(("kind", "name", "training"), CASES)
def test_a_paused_run_is_the_uninterrupted_one(request, tmp_path, kind, name, training):
    recipe = recipe_of(request, kind, name, **training)
    whole = train(recipe, name, output=tmp_path / "whole")
    epoch = whole.data["training"]["steps"] // 2
    pauses = [epoch - 1, epoch, epoch + 1]  # within an epoch, at its end, and in the next one
    *paused, done = chunked(recipe, name, tmp_path / "chunked", pauses)
    assert [(run.data["status"], run.data["step"], run.data["of"]) for run in paused] == [
        ("paused", pause, 2 * epoch) for pause in pauses
    ]
    same(whole, done)
    assert done.data["training"]["paused_at_steps"] == pauses and done.data["training"]["resumed_at_steps"] == []
    assert not list(done.folder.glob("progress.*")) and not (done.folder / "trainer").exists()
    assert done.data["seconds"]["load"] > whole.data["seconds"]["load"] and done.data["seconds"]["pauses"] > 0


@pytest.mark.parametrize("name", ["head", "adalora"])
def test_an_arm_that_can_not_be_continued_does_not_pause(request, tmp_path, name):
    recipe = recipe_of(request, "classify", name)
    first = train(recipe, name, output=tmp_path / "chunked", resume=True, pause_at=3)
    assert first.ok and first.data["training"]["paused_at_steps"] == []
    same(train(recipe, name, output=tmp_path / "whole"), first)


def test_a_pause_leaves_the_validation_curve_and_each_examples_score(request, tmp_path):
    recipe = recipe_of(request, "classify", "lora")
    for pause in (2, 4):
        run = train(recipe, "lora", output=tmp_path, resume=True, pause_at=pause)
        assert not (run.folder / "run.json").exists()
        progress = json.loads((run.folder / "progress.json").read_text())
        assert progress["schema"] == 1 and progress["step"] == pause and progress["of"] == 12
        assert progress["training"] > 0 and progress["seconds"] > 0
    assert [point["step"] for point in progress["validation"]] == [2, 4]
    scores = pandas.read_parquet(run.folder / "progress.parquet")
    assert list(scores.columns) == ["id", "step", "score"] and len(scores) == 2 * 24
    for point in progress["validation"]:  # of accuracy
        assert scores[scores["step"] == point["step"]]["score"].mean() == pytest.approx(point["accuracy"])


def test_a_call_that_asks_for_less_than_is_there_trains_nothing(request, tmp_path, monkeypatch):
    recipe = recipe_of(request, "instruct", "lora")
    train(recipe, "lora", output=tmp_path, resume=True, pause_at=4)

    def unexpected(*_, **__):
        raise AssertionError("loaded again")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "load_base", unexpected)
        assert train(recipe, "lora", output=tmp_path, resume=True, pause_at=3).data["step"] == 4
    folder = run_folder(tmp_path, recipe, "lora", 0)
    (folder / "progress.json").unlink()  # as if it was killed between the checkpoint and its progress
    steps = []
    monkeypatch.setattr(stages, "log_step", lambda log, step, *_: steps.append(step))
    again = train(recipe, "lora", output=tmp_path, resume=True, pause_at=4)
    assert again.data["status"] == "paused" and again.data["validation"][0]["step"] == 4 and steps == []
    scores = pandas.read_parquet(folder / "progress.parquet")["score"]
    assert len(scores) == 8 and (scores < 0).all()  # minus the loss
    assert train(recipe, "lora", output=tmp_path, resume=True, pause_at=8).ok  # its last step: nothing to pause for


def test_a_pause_before_the_first_step_is_refused(classify, tmp_path):
    with pytest.raises(RecipeError, match="pause_at: expected an optimizer step of 1 or more, got 0"):
        train(classify(), "lora", output=tmp_path / "o", pause_at=0)
    assert not (tmp_path / "o").exists()
