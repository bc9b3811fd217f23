"""`compare --share-base`: further seeds are trained together in one process; times come from a run alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig

from peft_recipes import Arm, RecipeError, compare, targets
from peft_recipes.comparison import shared_runs
from peft_recipes.comparison.orders import Order
from peft_recipes.comparison.shared_runs import SharedRuns
from peft_recipes.runs.folder import read_run, run_folder
from peft_recipes.training.together import why_alone


def lora(rank=2, **options):
    return Arm(LoraConfig(r=rank, target_modules=targets("llama", "attention"), **options), learning_rate=1e-2)


@pytest.fixture
def recipe(instruct):
    arms = {**instruct().arms, "small": lora(), "wide": lora(8)}
    return instruct(arms=arms, training={**instruct().training, "max_steps": 3})


def test_further_seeds_share_a_base_and_the_first_gives_the_times(recipe, tmp_path, monkeypatch):
    groups, started = [], shared_runs._started
    monkeypatch.setattr(
        shared_runs, "_started", lambda orders, log: (groups.append([o.job for o in orders]), started(orders, log))[1]
    )
    seen = []
    options = {"output": tmp_path, "share_base": True, "on_progress": seen.append}
    comparison = compare(recipe, ["small", "wide"], [0, 1], **options)
    assert groups == [[("small", 1), ("wide", 1)]]
    assert not comparison.failed and not comparison.failed_checks
    sizes = {
        (arm, seed): read_run(run_folder(tmp_path, recipe, arm, seed)).data["environment"].get("shared_base")
        for arm in ("small", "wide")
        for seed in (0, 1)
    }
    assert sizes == {job: None if job[1] == 0 else 2 for job in sizes}
    row = comparison.data["arms"]["small"]
    alone = read_run(run_folder(tmp_path, recipe, "small", 0)).data
    assert row["seeds"] == [0, 1] and row["training_seconds"] == alone["training"]["seconds"]
    assert any("Not in the medians of time" in note and "'small' seed 1" in note for note in comparison.data["notes"])
    assert {(p.job, p.state) for p in seen if p.state == "ok"} >= {(job, "ok") for job in sizes}
    assert not (tmp_path / recipe.name / "shared-base.txt").exists()
    groups.clear()
    compare(recipe, ["small", "wide"], [0, 1], **options)
    assert groups == []  # all are kept


def test_a_group_that_breaks_leaves_its_runs_to_be_trained_alone(recipe, tmp_path, monkeypatch):
    broken = {"command": ["-c", "raise SystemExit('no memory for the joint step')"]}
    start = shared_runs.start
    monkeypatch.setattr(shared_runs, "start", lambda command, *_, **__: start([command[0], *broken["command"]], *_))
    comparison = compare(recipe, ["small"], [0, 1, 2], output=tmp_path, share_base=True)
    assert not comparison.failed and comparison.data["arms"]["small"]["seeds"] == [0, 1, 2]
    note = next(note for note in comparison.data["notes"] if note.startswith("--share-base"))
    assert "'small' seed 1, 'small' seed 2 did not end in the shared process (shared-base.txt), and ran alone." in note
    assert "no memory for the joint step" in (tmp_path / recipe.name / "shared-base.txt").read_text()


def orders(recipe, *jobs):
    return [Order(Path("unused"), recipe, job, Path("unused")) for job in jobs]


def test_groups_fit_the_memory_with_the_base_counted_once(recipe):
    estimate = {"weights": 100, "libraries": 20, "total": 150}  # 30 of a run's own, 75 in a joint pass
    shared = SharedRuns({"small": {**estimate, "machine": 300}}, None)
    jobs = [("small", seed) for seed in range(5)]
    assert [[order.job for order in group] for group in shared._groups(orders(recipe, *jobs))] == [jobs[:2], jobs[2:4]]
    unlimited = SharedRuns({"small": {**estimate, "machine": None}}, None)
    assert [len(group) for group in unlimited._groups(orders(recipe, *jobs))] == [5]


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        (Arm(learning_rate=1e-3), "trains weights of the base"),
        (Arm(IA3Config(), learning_rate=1e-3), "its method is IA3"),
        (lora(bias="all"), "trains biases of the base"),
        (lora(init_lora_weights="pissa"), "changes the base"),
        (lora(trainable_token_indices=[3]), "trainable_token_indices"),
        (Arm(lora().method, quantise="nf4"), "its base is quantised"),
    ],
)
def test_an_arm_that_needs_a_base_of_its_own_says_why(recipe, arm, reason):
    assert reason in why_alone(recipe, arm)


def test_runs_of_other_options_and_tasks_are_trained_alone(recipe, prefer):
    assert why_alone(recipe, lora(use_rslora=True, lora_dropout=0.1)) is None
    checkpointing = recipe.with_changes({"training": {"gradient_checkpointing": True}})
    assert why_alone(checkpointing, lora()) == "training.gradient_checkpointing is set"
    assert why_alone(prefer(), prefer().arms["lora"]) == "the task is dpo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [0]}, "there is no other. Name more with --seeds"),
        ({"seeds": [0, 1], "launch": "ddp"}, "leave out --launch"),
        ({"seeds": [0, 1], "on": "ray"}, "leave out --on ray"),
        ({"seeds": [0, 1], "chunks": 4}, "leave out one of them"),
    ],
)
def test_what_contradicts_it_is_an_error_before_anything_is_trained(recipe, tmp_path, options, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        compare(recipe, ["small"], output=tmp_path, share_base=True, **options)
    assert not list(tmp_path.iterdir())
