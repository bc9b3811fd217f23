"""sft compared by what its answers are worth: columns, metrics, verdicts, and what can't be scored."""

from __future__ import annotations

import json

import pandas
import pytest

from peft_recipes import Dataset, RecipeError, compare, plan, train
from peft_recipes.adapters.open import evaluate, open_adapter
from peft_recipes.tasks.registry import task_of


def says_good(prediction, row):
    return float("good" in prediction and "prompt" in row)


@pytest.fixture(scope="module")
def compared(instruct, tmp_path_factory):
    recipe = instruct(metric="f1", test_generations=6, training={
        "num_train_epochs": 6, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False})  # fmt: skip
    return compare(recipe, output=tmp_path_factory.mktemp("scored"), seeds=[0, 1])


def test_every_answer_is_stored_with_its_score(compared):
    for arm in ("full", "lora"):
        rows = pandas.read_parquet(compared.folder / arm / "seed-0" / "predictions.parquet")
        test = rows[rows["split"] == "test"]
        answered = test[test["f1"].notna()]
        assert len(test) == 8 and len(answered) == 6
        metrics = json.loads((compared.folder / arm / "seed-0" / "run.json").read_text())["metrics"]["test"]
        assert metrics["f1"] == pytest.approx(answered["f1"].mean())
        assert metrics["answer_tokens"] == pytest.approx(answered["answer_tokens"].mean())
        assert metrics["ended"] == pytest.approx(answered["ended"].astype(float).mean())
        assert metrics["bits_per_byte"] > 0
        log = [json.loads(line) for line in (compared.folder / arm / "seed-0" / "log.jsonl").read_text().splitlines()]
        assert [(e["step"], e["of"]) for e in log if e.get("stage") == "answer"][-1] == (6, 6)
        assert answered["prompt"].str.len().gt(0).all() and answered["reference"].str.len().gt(0).all()


def test_the_arms_are_compared_by_their_answers_on_the_same_examples(compared):
    data = compared.data
    assert data["metric"] == "f1" and data["higher_is_better"] and data["selection_metric"] == "loss"
    difference = data["differences"]["lora"]
    assert difference["examples"] == 6 and difference["seeds"] == 2 and difference["margin"] == 0.01
    full, lora = (data["arms"][arm]["metric"]["mean"] for arm in ("full", "lora"))
    assert difference["estimate"] == pytest.approx(lora - full)
    assert "f1" in data["base"]["metrics"]["test"]


def test_the_comparison_has_the_examples_on_which_the_arms_differ(compared):
    stored = {}
    for arm in ("full", "lora"):
        rows = pandas.read_parquet(compared.folder / arm / "seed-0" / "predictions.parquet")
        stored[arm] = rows[rows["f1"].notna()].set_index("id")
    entry, change = compared.data["disagreements"]["lora"], stored["lora"]["f1"] - stored["full"]["f1"]
    assert (entry["against"], entry["seed"], entry["examples"]) == ("full", 0, 6)
    assert (entry["gained"]["count"], entry["lost"]["count"]) == ((change > 0).sum(), (change < 0).sum())
    for example in (each for kind in ("gained", "lost", "changed") for each in entry[kind]["examples"]):
        assert stored["lora"]["answer"][example["id"]] == example["answer"]
        assert stored["full"]["f1"][example["id"]] == example["score_against"]
    page = (compared.folder / "comparison.html").read_text(encoding="utf-8")
    assert "Ended answers" in page and "Where the arms differ" in page


def test_a_reloaded_adapter_gives_the_same_answers(compared):
    folder = compared.folder / "lora" / "seed-0"
    opened = open_adapter(folder)
    again = evaluate(opened, opened.attach(opened.load_base()))
    rows = pandas.read_parquet(folder / "predictions.parquet")
    stored = rows[rows["split"] == "test"]["answer"].dropna().tolist()
    assert [a for a in again.predictions["answer"] if a is not None] == stored


def test_a_function_of_the_user_scores_the_answers(instruct, tmp_path):
    recipe = instruct(score=says_good)
    run = train(recipe, "lora", output=tmp_path)
    rows = pandas.read_parquet(run.folder / "predictions.parquet")
    assert run.metrics["test"]["score"] == pytest.approx(rows["score"].mean())
    # A downloaded recipe does not run its function.
    opened = open_adapter(run.folder)
    assert opened.task.recipe.score is None
    assert open_adapter(run.folder, trust_remote_code=True).task.recipe.score == recipe.score


def asks_too_much(prediction, row):
    return row["nope"]


def test_a_function_that_raises_is_an_error_before_anything_is_trained(instruct):
    with pytest.raises(RecipeError, match="asks_too_much raised KeyError: 'nope'"):
        plan(instruct(score=asks_too_much))


def knows_only_references(prediction, row):
    return {row["output"]: 1.0}[prediction]


def test_a_score_that_raises_on_an_answer_leaves_the_trained_run(instruct, tmp_path):
    comparison = compare(instruct(score=knows_only_references), output=tmp_path)
    assert comparison.failed == [] and comparison.failed_checks == ["base", "full", "lora"]
    run = json.loads((comparison.folder / "lora" / "seed-0" / "run.json").read_text())
    assert "knows_only_references raised KeyError" in run["checks"]["score of test"]["error"]
    assert (comparison.folder / "lora" / "seed-0" / "adapter_model.safetensors").is_file()
    assert comparison.data["arms"]["lora"]["metric"] is None and comparison.data["differences"] == {}
    assert "score of test" in (comparison.folder / "comparison.md").read_text()
    answers = pandas.read_parquet(comparison.folder / "lora" / "seed-0" / "predictions.parquet")["answer"]
    assert answers.notna().all()


def test_a_further_set_without_prompts_is_compared_by_its_loss(instruct, tmp_path):
    text = tmp_path / "plain.csv"
    text.write_text("text\nthe film was bright\na day was cold\nit is so warm\n")
    further = {"plain": {"path": str(text), "format": "text", "test": None, "validation": None, "train": None}}
    recipe = instruct(metric="contains", evaluate_also=further)
    comparison = compare(recipe, ["lora"], output=tmp_path / "out")
    assert comparison.data["forgetting"]["plain"]["metric"] == "loss"


def test_references_that_can_not_be_compared_with_are_an_error_before_anything_is_trained(instruct):
    with pytest.raises(
        RecipeError, match=r"metric 'number': 8 of 8 test references can't be compared with: that of row"
    ):
        plan(instruct(metric="number"))


def test_plain_text_has_no_answers_to_score(instruct, tmp_path):
    text = tmp_path / "plain.csv"
    text.write_text("text\n" + "\n".join(f"the film {i} was bright" for i in range(20)))
    with pytest.raises(RecipeError, match=r"are plain text\. Set metric: loss"):
        plan(instruct(metric="rougeL", dataset=Dataset(str(text))))


def test_options_of_generation_reach_the_model(instruct, tmp_path):
    run = train(instruct(metric="f1", generation={"max_new_tokens": 2}), "base", output=tmp_path)
    assert pandas.read_parquet(run.folder / "predictions.parquet")["answer_tokens"].max() <= 2


def test_a_scan_selects_by_the_loss_and_answers_nothing(instruct):
    task = task_of(instruct(metric="f1"))
    task.reads_test = False
    assert task.prepare().prompts == {}


def test_a_plan_says_what_the_answers_cost(instruct):
    planned = plan(instruct(metric="f1", test_generations=6), ["lora"], trial=True)
    answers = planned["answers"]
    assert answers["prompts"] == 6 and answers["max_new_tokens"] > 1
    assert any(f"up to {6 * answers['max_new_tokens']} tokens a run" in note for note in planned["notes"])
    assert planned["arms"]["lora"]["trial"]["answer_seconds"] > 0
    assert plan(instruct(), ["lora"])["answers"] is None
