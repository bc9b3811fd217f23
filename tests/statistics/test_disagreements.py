"""Test examples that one arm gets right and the other wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest

from peft_recipes import Arm, Dataset, Recipe
from peft_recipes.runs.folder import Run, read_run
from peft_recipes.runs.predictions import write_preferences
from peft_recipes.statistics.disagreements import ANSWER_LENGTH, answers_cut_at, disagreements

KEPT = Path(__file__).parents[2] / "adapters" / "mnist-shift"


def recipe(task: str = "sft", metric: str = "number") -> Recipe:
    return Recipe(name="made", task=task, model="some/model", dataset=Dataset("data.jsonl"), metric=metric,
                  arms={"full": Arm(learning_rate=1e-5)})  # fmt: skip


def run(folder: Path, split: str = "test", data: dict | None = None, **columns: list) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    size = len(next(iter(columns.values())))
    frame = {"split": [split] * size, "id": [f"row-{n}" for n in range(size)]}
    pandas.DataFrame(frame | columns).to_parquet(folder / "predictions.parquet")
    return Run(folder, {"status": "ok", "metrics": {"test": {}}, **(data or {})})


def answered(folder: Path, metric: str, scores: list, answers: list[str], **columns: list) -> Run:
    texts = {
        "prompt": [f"Question {n}?" for n in range(len(scores))],
        "answer": answers,
        "reference": ["7"] * len(scores),
    }
    return run(folder, **texts, **{metric: scores}, **columns)


def compared(made: Recipe, lora: Run, full: Run) -> dict:
    return disagreements(made, {("lora", 0): lora, ("full", 0): full}, ["full", "lora"], [0], "full")


def test_an_example_is_gained_lost_or_changed(tmp_path):
    lora = answered(tmp_path / "lora", "number", [1, 0, 1, 0, 0, None], ["7", "8", "7", "9", "1", "x"])
    full = answered(tmp_path / "full", "number", [0, 1, 1, 0, 0, None], ["6", "7", "7", "8", "1", "y"])
    (entry,) = compared(recipe(), lora, full).values()
    assert (entry["against"], entry["seed"], entry["kind"], entry["examples"]) == ("full", 0, "right", 5)
    assert [entry[kind]["count"] for kind in ("gained", "lost", "changed")] == [1, 1, 1]
    assert entry["gained"]["examples"] == [
        {"id": "row-0", "prompt": "Question 0?", "reference": "7", "answer": "7", "answer_against": "6", "score": 1.0,
         "score_against": 0.0}
    ]  # fmt: skip
    assert [entry[kind]["examples"][0]["id"] for kind in ("lost", "changed")] == ["row-1", "row-3"]


def test_of_scores_the_largest_differences_come_first(tmp_path):
    scores = [0.5, 0.9, 0.2, 0.6, 0.3, 0.35, 0.4, 0.1]
    lora = answered(tmp_path / "lora", "rougeL", scores, ["a"] * 8)
    full = answered(tmp_path / "full", "rougeL", [0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.8], ["b"] * 8)
    entry = compared(recipe(metric="rougeL"), lora, full)["lora"]
    assert (entry["kind"], entry["gained"]["count"], entry["lost"]["count"]) == ("score", 6, 1)
    assert [each["id"] for each in entry["gained"]["examples"]] == ["row-1", "row-3", "row-6", "row-5", "row-4"]
    assert entry["changed"]["examples"][0]["score"] == 0.5  # a tie, but another answer
    assert entry == compared(recipe(metric="rougeL"), lora, full)["lora"]


def test_pseudo_values_choose_the_examples_but_are_not_shown_as_their_scores(tmp_path):
    lora = answered(tmp_path / "lora", "bleu", [1.7, 0.2], ["a", "b"])
    full = answered(tmp_path / "full", "bleu", [0.2, 0.2], ["c", "b"])
    entry = compared(recipe(metric="bleu"), lora, full)["lora"]
    assert entry["gained"]["examples"][0]["score"] is None and entry["gained"]["count"] == 1


def test_a_judges_preferences_are_wins_losses_and_ties(tmp_path):
    lora, full = (
        run(tmp_path / name, prompt=["?"] * 4, reference=["7"] * 4, answer=[f"{name} {n}" for n in range(3)] + [None])
        for name in ("lora", "full")
    )
    write_preferences(lora.folder, {"id": ["row-0", "row-1", "row-2"], "preference": [1.0, 0.0, 0.5]})
    made = recipe(metric="number")
    made.metric = "preference"
    entry = compared(made, lora, full)["lora"]
    assert (entry["kind"], entry["examples"]) == ("preference", 3)
    assert [entry[kind]["examples"][0]["id"] for kind in ("gained", "lost", "changed")] == ["row-0", "row-1", "row-2"]


def test_a_loss_alone_tells_nothing_of_an_example(tmp_path):
    lora, full = (run(tmp_path / name, loss=[1.0, 2.0], tokens=[3, 4]) for name in ("lora", "full"))
    assert compared(recipe(metric="loss"), lora, full) == {}


def test_a_regression_has_no_right_or_wrong(tmp_path):
    lora, full = (run(tmp_path / name, label=[1.5, 2.0], prediction=[1.0, 2.0]) for name in ("lora", "full"))
    assert compared(recipe("text-classification", "accuracy"), lora, full) == {}


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_class_is_shown_by_its_name(tmp_path, metric):
    names = {"per_class": [{"label": "ham"}, {"label": "spam"}]}
    lora = run(tmp_path / "lora", data=names, label=[0, 1, 1], prediction=[0, 1, 0], loss=[0.1] * 3)
    full = run(tmp_path / "full", data=names, label=[0, 1, 1], prediction=[1, 1, 1], loss=[0.1] * 3)
    entry = compared(recipe("text-classification", metric), lora, full)["lora"]
    gained, lost = entry["gained"]["examples"][0], entry["lost"]["examples"][0]
    assert (gained["id"], gained["prompt"], gained["reference"]) == ("row-0", None, "ham")
    assert (gained["answer"], gained["answer_against"]) == ("ham", "spam")
    assert (lost["reference"], lost["answer"], lost["answer_against"]) == ("spam", "ham", "spam")


def test_several_labels_of_an_example_are_right_together(tmp_path):
    names = {"per_class": [{"label": "a"}, {"label": "b"}]}
    lora = run(tmp_path / "lora", data=names, label=[[0, 1], []], prediction=[[0, 1], []])
    full = run(tmp_path / "full", data=names, label=[[0, 1], []], prediction=[[0], []])
    entry = compared(recipe("text-classification", "accuracy"), lora, full)["lora"]
    assert entry["gained"]["examples"][0]["reference"] == "a, b" and entry["gained"]["count"] == 1


def test_long_answers_lose_their_middle(tmp_path):
    text = "start " + "word " * 400 + "end"
    lora = answered(tmp_path / "lora", "number", [1.0], [text])
    full = answered(tmp_path / "full", "number", [0.0], ["x"])
    answer = compared(recipe(), lora, full)["lora"]["gained"]["examples"][0]["answer"]
    assert answer.startswith("start ") and answer.endswith(" end") and len(answer) <= ANSWER_LENGTH


def test_the_first_seed_that_both_finished_is_compared(tmp_path):
    made = {(arm, seed): answered(tmp_path / arm / str(seed), "number", [float(arm == "lora")], [arm])
            for arm in ("lora", "full") for seed in (0, 1)}  # fmt: skip
    made["full", 0].data["status"] = "failed"
    assert disagreements(recipe(), made, ["full", "lora"], [0, 1], "full")["lora"]["seed"] == 1
    made["lora", 1].data["status"] = "out-of-memory"
    assert disagreements(recipe(), made, ["full", "lora"], [0, 1], "full") == {}


def test_the_counts_agree_with_the_accuracies_of_kept_runs():
    made = Recipe.from_yaml(KEPT / "recipe.yaml")
    arms = [arm for arm in made.arms if (KEPT / arm / "seed-0" / "run.json").is_file()]
    runs = {(arm, 0): read_run(KEPT / arm / "seed-0") for arm in arms}
    accuracy = {arm: runs[arm, 0].metrics["test"]["accuracy"] for arm in arms}
    found = disagreements(made, runs, arms, [0], "full")
    assert set(found) == set(arms) - {"full"}
    for arm, entry in found.items():
        change = (entry["gained"]["count"] - entry["lost"]["count"]) / entry["examples"]
        assert change == pytest.approx(accuracy[arm] - accuracy["full"], abs=1e-9)
    json.dumps(found, allow_nan=False)


def test_the_limit_of_cut_answers_is_their_length(tmp_path):
    cut = answered(tmp_path / "cut", "number", [0, 0, None], ["a", "b", None], answer_tokens=[64, 7, None],
                   ended=[False, True, None])  # fmt: skip
    cut.data["metrics"] = {"test": {"ended": 0.5}}
    done = run(tmp_path / "done", data={"metrics": {"test": {"ended": 1.0}}}, loss=[1.0])
    assert answers_cut_at([done, cut]) == 64
    assert answers_cut_at([done]) is None
