"""A process that keeps the base and the data trains each run as one that loads them, whatever it trained between."""

from __future__ import annotations

import pytest
from equal_runs import same
from peft import LoraConfig

from peft_recipes import Arm, targets, train
from peft_recipes.models import bases
from peft_recipes.training import kept

UNTIMED = ["reload", "merge", "fresh-process"]
KINDS = [("classify", "distilbert"), ("instruct", "gpt2"), ("translate", "t5")]


@pytest.fixture
def keeping(monkeypatch):
    """Keep what runs load until the test ends; count the loaded bases."""
    loaded, load = [], bases.load_model

    def counted(*args, **options):
        loaded.append(args)
        return load(*args, **options)

    monkeypatch.setattr(kept, "_kept", None)
    monkeypatch.setattr(bases, "load_model", counted)
    kept.keep(0)
    return loaded


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_runs_in_turns_on_a_kept_base_are_those_on_a_loaded_one(request, keeping, monkeypatch, tmp_path, task, kind):
    def lora(**options):
        return LoraConfig(r=4, lora_dropout=0.1, target_modules=targets(kind, "attention"), **options)

    arms = {"full": Arm(learning_rate=5e-3), "lora": Arm(lora(), learning_rate=2e-2),
            "pissa": Arm(lora(init_lora_weights="pissa"), learning_rate=1e-2)}  # fmt: skip
    recipe = request.getfixturevalue(task)(kind, arms=arms, skip_checks=UNTIMED, prompts=[])
    recipe = recipe.with_changes({"training": {"num_train_epochs": 1}})
    for pause in (2, None):
        done = {name: train(recipe, name, output=tmp_path / "turns", resume=True, pause_at=pause) for name in arms}
    assert all(run.data["environment"]["warm"] for run in done.values())
    in_turns = len(keeping)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_kept", None)
        for name, run in done.items():
            same(train(recipe, name, output=tmp_path / "alone"), run)
    assert in_turns < len(keeping)


def test_the_base_is_loaded_once_for_each_seed_and_not_kept_without_room(classify, keeping, monkeypatch, tmp_path):
    recipe = classify(skip_checks=UNTIMED)
    for seed in (0, 1):
        before = len(keeping)
        for name in ("full", "lora"):
            train(recipe, name, seed=seed, output=tmp_path, resume=True, pause_at=2)
        assert len(keeping) == before + 1
    monkeypatch.setattr(kept, "free_memory_bytes", lambda: 0)
    train(recipe, "full", seed=1, output=tmp_path, resume=True, pause_at=4)  # the kept one itself
    assert len(keeping) == before + 1
    train(recipe, "lora", seed=1, output=tmp_path, resume=True, pause_at=4)
    assert len(keeping) == before + 2
