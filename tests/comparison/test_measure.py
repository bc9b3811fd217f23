"""`--measure` takes times and memory of finished runs again, the arms in turns, and leaves their quality alone."""

from __future__ import annotations

import copy
import json

import pytest
from typer.testing import CliRunner

import peft_recipes.comparison.compare as compare_module
from peft_recipes import RecipeError
from peft_recipes.cli.app import app
from peft_recipes.comparison import turns
from peft_recipes.comparison.collecting import collect
from peft_recipes.comparison.compare import compare
from peft_recipes.comparison.turns import measure_in_turns, measured
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.training.remeasure import remeasure
from peft_recipes.training.run import train

ARMS = ("full", "head", "lora")


@pytest.fixture(scope="module")
def trained(classify, tmp_path_factory) -> tuple[Recipe, dict]:
    """A run of each arm, trained in this process."""
    output, recipe = tmp_path_factory.mktemp("measure"), classify()
    return recipe, {arm: train(recipe, arm, output=output) for arm in ARMS}


def verdict(name: str) -> dict:
    return {"verdict": name, "why": "its threads waited 9 % of their time" if name == "disturbed" else None}


def one_turn(step: float, name: str = "quiet", first_pass: float | None = None) -> dict:
    """What `remeasure` returns, invented: two steps after three to warm up, of ten tokens each."""
    seconds = 2 * step + (first_pass or 0)
    training = {"seconds": seconds, "warmup_seconds": 9.0, "first_pass_seconds": first_pass, "peak_memory_bytes": 1000}
    rates = {"tokens_per_second": 20 / seconds, "examples_per_second": 2 / seconds}
    return {
        "training": {**training, **rates, "disturbance": verdict(name)},
        "step_seconds": [step, step],
        "latency_ms": {"base": 1.0, "adapter": step, "merged": None},
        "generation_tokens_per_second": None,
        "environment": {"threads": 1},
    }


RUN = {"training": {"steps": 103, "warmup_steps": 3}, "environment": {"threads": 2, "dataset_fingerprint": "f"}}


def test_figures_are_medians_over_the_quiet_turns():
    found = measured(RUN, [one_turn(1.0), one_turn(9.0, "disturbed"), one_turn(3.0)])
    assert found["training"]["median_step_seconds"] == 2.0 and found["training"]["seconds"] == 200.0
    assert found["training"]["disturbance"]["verdict"] == "quiet" and found["quiet_rounds"] == 2
    assert found["latency_ms"] == {"base": 1.0, "adapter": 2.0, "merged": None}
    assert found["environment"] == {"threads": 1, "dataset_fingerprint": "f", "shared_base": None}


def test_without_a_quiet_turn_the_figures_stay_disturbed():
    found = measured(RUN, [one_turn(1.0, "disturbed")])
    assert found["training"]["disturbance"] == verdict("disturbed") and found["quiet_rounds"] == 0


def test_a_first_pass_counts_once_in_time_and_not_in_throughput():
    found = measured(RUN, [one_turn(1.0, first_pass=50.0)])
    assert found["training"]["seconds"] == 150.0 and found["training"]["tokens_per_second"] == pytest.approx(10.0)


def test_arms_take_turns_and_their_quality_stays(trained, monkeypatch):
    recipe, runs = trained
    monkeypatch.setattr(turns, "ROUNDS", 2)
    files = {path: path.read_bytes() for run in runs.values() for path in run.folder.rglob("*") if path.is_file()}
    order = []

    def turn(run, data):
        order.append(run.data["arm"])
        found = remeasure(run.folder, run.data["arm"], 0, steps=2, data=data)
        return found | {"training": found["training"] | {"disturbance": verdict("quiet")}}

    assert measure_in_turns(list(runs.values()), None, turn=turn) == []
    assert order == [*ARMS, *ARMS]
    changed = [path.name for path, content in files.items() if path.read_bytes() != content]
    assert changed == ["run.json"] * 3
    for arm, run in runs.items():
        data = json.loads((run.folder / "run.json").read_text())
        again = data.pop("measured")
        assert data == json.loads(files[run.folder / "run.json"])
        steps = data["training"]["steps"] - data["training"]["warmup_steps"]
        first_pass = again["training"]["first_pass_seconds"] or 0.0
        assert (first_pass > 0) == (arm == "head")
        assert again["training"]["seconds"] == pytest.approx(
            steps * again["training"]["median_step_seconds"] + first_pass
        )
        known = {name for name, value in data["latency_ms"].items() if value}
        assert {name for name, value in again["latency_ms"].items() if value} == known
    made = collect(recipe, ARMS, [0], runs["full"].folder.parents[2])
    lora = made.data["arms"]["lora"]
    assert lora["training_seconds"] == json.loads((runs["lora"].folder / "run.json").read_text())["measured"][
        "training"
    ]["seconds"]  # fmt: skip
    assert lora["timing"]["comparable"] and "the speed" in made.verdict("lora")
    assert any("taken again by `--measure`" in note for note in made.data["notes"])


def test_it_trains_the_same_batches_as_the_run(trained):
    _, runs = trained
    again = remeasure(runs["lora"].folder, "lora", 0, steps=2)
    losses = [loss for _, loss in runs["lora"].data["training"]["losses"]]
    assert [loss for _, loss in again["training"]["losses"]] == pytest.approx(losses[:5], rel=1e-5)


def test_an_arm_that_cannot_be_measured_keeps_its_figures_and_is_noted(trained):
    _, runs = trained
    before = {arm: (run.folder / "run.json").read_text() for arm, run in runs.items()}

    def turn(run, data):
        if run.data["arm"] == "head":
            raise RecipeError("Arm 'head', seed 0 could not be measured again: out of memory")
        return copy.deepcopy(one_turn(1.0))

    assert measure_in_turns(list(runs.values()), None, turn=turn) == [
        "Arm 'head', seed 0 could not be measured again: out of memory"
    ]
    after = {arm: (run.folder / "run.json").read_text() for arm, run in runs.items()}
    assert [arm for arm in ARMS if after[arm] != before[arm]] == ["full", "lora"]


def test_times_of_a_launch_are_not_taken_by_one_process(classify, tmp_path):
    with pytest.raises(RecipeError, match="--measure takes times in one process"):
        compare(classify(), ["lora"], output=tmp_path, launch="ddp", processes=2, measure=True)
    assert not list(tmp_path.iterdir())


def test_a_turn_is_a_process_of_its_own_and_says_why_it_failed(trained, monkeypatch):
    _, runs = trained
    found = turns._in_fresh_process(runs["lora"], None)
    assert len(found["step_seconds"]) == turns.STEPS and found["latency_ms"]["merged"] > 0
    monkeypatch.setattr(turns.sys, "executable", "/bin/false")
    with pytest.raises(RecipeError, match=r"Arm 'lora', seed 0 could not be measured again: exit code 1"):
        turns._in_fresh_process(runs["lora"], None)


def test_a_run_of_another_environment_is_compared_by_quality_alone(trained):
    recipe, runs = trained
    path = runs["full"].folder / "run.json"
    before = path.read_text()
    data = json.loads(before)
    data.pop("measured", None)
    data["environment"]["threads"] += 6
    path.write_text(json.dumps(data))
    try:
        made = collect(recipe, ["full", "head"], [0], path.parents[3])
    finally:
        path.write_text(before)
    words = made.verdict("head")
    assert "'head' was measured with" in words and "the speed" not in words and "of the memory" not in words
    assert made.data["differences"]["head"]["verdict"] and "checkpoint instead of" in words
    assert any("--overwrite" in note for note in made.data["notes"])
    page = (made.folder / "comparison.html").read_text()
    assert "the speed" not in page and "of the memory" not in page


def test_the_option_reaches_the_comparison(monkeypatch, tmp_path):
    called = {}
    monkeypatch.setattr(compare_module, "compare", lambda *_, **options: called.update(options) or 1 / 0)
    CliRunner().invoke(app, ["compare", "gpt2-sms-spam", "--embedded", "--measure", "--output", str(tmp_path)])
    assert called["measure"] is True
