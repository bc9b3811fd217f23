"""`compare --drop`: arms that are surely behind on validation are trained no further; and changes between chunks."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from typer.testing import CliRunner
from workspace import ThisProcess

import peft_recipes.comparison.compare as comparing
from peft_recipes import Arm, Dataset, RecipeError, compare
from peft_recipes.cli.app import app
from peft_recipes.comparison.changes import read_changes
from peft_recipes.comparison.dropping import margin_of, with_drop
from peft_recipes.comparison.requests import ask
from peft_recipes.comparison.until_decided import Until


@pytest.fixture(scope="module")
def in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "executor_of", ThisProcess)
        yield


@pytest.fixture(scope="module")
def recipe(classify, reviews):
    """Full and quick learn the task in a few steps; lora is trained at no rate to speak of."""
    lora = Arm(classify().arms["lora"].method, learning_rate=1e-9)
    arms = {"full": Arm(learning_rate=5e-3), "quick": Arm(learning_rate=4e-3), "lora": lora}
    training = {"max_steps": 16, "per_device_train_batch_size": 16, "use_cpu": True, "bf16": False}
    data = Dataset(str(reviews), train=64, validation=56, test=40)
    return classify(
        arms=arms, training=training, dataset=data, skip_checks=["fresh-process", "reload", "merge", "learning"]
    )


@pytest.fixture(scope="module")
def dropped(in_this_process, recipe, tmp_path_factory):
    output, news = tmp_path_factory.mktemp("dropped"), []
    made = compare(recipe, seeds=[0, 1], output=output, chunks=4, drop=True, on_progress=news.append)
    return made, [(*each.job, each.state) for each in news if each.state in ("ok", "paused", "dropped")]


def test_an_arm_that_is_surely_behind_is_trained_no_further_with_any_seed(dropped):
    made, news = dropped
    assert [state for arm, seed, state in news if (arm, seed) == ("lora", 0)] == ["paused", "paused", "dropped"]
    assert [state for arm, seed, state in news if (arm, seed) == ("lora", 1)] == ["dropped"]
    assert not (made.folder / "lora" / "seed-1").exists() and made.failed == []
    for arm in ("full", "quick"):
        assert made.data["arms"][arm]["seeds"] == [0, 1]


def test_it_stays_in_the_table_as_what_it_is_without_a_verdict(dropped):
    made, _ = dropped
    arm = made.data["arms"]["lora"]
    assert arm["status"] == "dropped" and arm["error"] is None and arm["metric"] is None and arm["failures"] == []
    assert (arm["progress"]["step"], arm["progress"]["of"]) == (8, 16)
    assert [step for step, _ in arm["progress"]["validation"]] == [4, 8]
    assert "its validation accuracy was 0." in arm["progress"]["reason"] and "lora" not in made.data["differences"]
    text = (made.folder / "comparison.md").read_text()
    assert "dropped, step 8 of 16" in text and "its validation accuracy was" in text
    assert "dropped" in made.verdict("lora") and "has no result" in made.verdict("lora")


def test_a_drop_is_stored_with_its_reason_and_its_checkpoint_kept(dropped, recipe):
    made, _ = dropped
    (entry,) = json.loads((made.folder / "changes.json").read_text())["stopped"]
    assert (entry["arm"], entry["by"], entry["seed"], entry["step"], entry["of"]) == ("lora", "drop", 0, 8, 16)
    assert (made.folder / "lora" / "seed-0" / "trainer" / "checkpoint-8").is_dir()
    news = []
    again = compare(recipe, seeds=[0, 1], output=made.folder.parent, on_progress=lambda each: news.append(each.state))
    rows = [{**each.data["arms"]["lora"], "estimated_memory": None} for each in (made, again)]  # of what is free now
    assert rows[0] == rows[1] and "running" not in news and news.count("dropped") == 2


def asking(folder, acts, news):
    """A listener that asks, once, when a run is paused: `acts` by (job, step number of its pauses)."""
    seen, said, threads = [], {}, []

    def see(progress):
        news.append((*progress.job, progress.state))
        if progress.state != "paused":
            return
        seen.append(progress.job)
        request = acts.pop((progress.job, seen.count(progress.job)), None)
        if request is not None:
            threads.append(threading.Thread(target=lambda: said.update({request["do"]: ask(folder, request)})))
            threads[-1].start()
            while not list((folder / ".changes").glob("*.request")):
                threading.Event().wait(0.005)

    return see, said, threads


def test_an_arm_that_takes_turns_is_stopped_and_taken_up_between_them(in_this_process, recipe, tmp_path):
    acts = {
        (("lora", 0), 1): {"do": "stop", "arm": "lora"},
        (("full", 0), 2): {"do": "add", "arm": "lora", "changes": [], "name": None},
    }
    news = []
    see, said, threads = asking(tmp_path / "tiny", acts, news)
    made = compare(recipe, ["full", "lora"], output=tmp_path, chunks=4, on_progress=see)
    for thread in threads:
        thread.join()
    assert said["stop"] == "lora is stopped at step 4 of 16 of seed 0; no seed of it is finished."
    assert said["add"] == "lora goes on from step 4 of 16 of seed 0, after the runs that are planned."
    turns = [each for each in news if each[2] in ("ok", "paused", "stopped") and each[0] != "base"]
    lora, full = (("lora", 0, "paused"), ("full", 0, "paused"))
    assert turns[:5] == [full, lora, ("lora", 0, "stopped"), full, full]
    assert turns[5] == ("full", 0, "ok") and turns[-1] == ("lora", 0, "ok")
    assert made.data["arms"]["lora"]["status"] == "ok" and read_changes(made.folder).stopped == []


def test_with_seeds_until_it_is_decided_a_dropped_arm_is_given_up(in_this_process, recipe, tmp_path):
    made = compare(recipe, output=tmp_path, chunks=4, drop=True, until=Until(max_seeds=3))
    design = made.data["design"]
    assert design["given_up"] == ["lora"] and design["seeds_of"]["lora"] == []
    assert design["seeds_of"]["full"] == design["seeds_of"]["quick"] == [0, 1, 2]
    assert made.data["arms"]["lora"]["status"] == "dropped" and [*made.data["differences"]] == ["quick"]


def test_drop_needs_chunks_and_takes_eight():
    assert with_drop(1) == 8 and with_drop(3) == 3
    with pytest.raises(RecipeError, match=r"--chunks 2 leaves nothing to save\. Take 3 or more"):
        with_drop(2)


@pytest.mark.parametrize("words", [["--drop", "--chunks", "2"], ["--drop", "--on", "ray"]])
def test_what_does_not_go_with_drop_is_one_message(recipe, tmp_path, words):
    recipe.to_yaml(tmp_path / "mine.yaml")
    arguments = ["compare", tmp_path / "mine.yaml", "--output", tmp_path / "o", *words]
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    assert result.exit_code == 2 and "--chunks" in result.stderr and not (tmp_path / "o").exists()


def test_the_margin_of_a_race_is_that_of_its_scores(recipe):
    right, losses = np.array([0.0, 1.0, 1.0]), np.array([-2.0, -4.0])
    assert margin_of(recipe, {"full": right}) == 0.01 and margin_of(recipe, {"full": losses}) == pytest.approx(0.03)
    assert margin_of(recipe.with_changes({"margin": 0.05}), {"full": right}) == 0.05
