"""Forgetting: further evaluation splits before and after tuning, with intervals; also plain text."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest
from small import compared_here, sentences

from peft_recipes import RecipeError, load_recipe
from peft_recipes.reporting.sentences import forgetting
from peft_recipes.statistics.bootstrap import paired_difference
from peft_recipes.tasks.registry import task_of


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A jsonl of plain texts in the column "body", some blank."""
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    rows = [{"body": text} for text, _ in sentences(30, seed=9)] + [{"body": " "}] * 5
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("forgetting")


@pytest.fixture
def comparison(instruct, prose, kept):
    plain = {"path": str(prose), "text": "body", "format": "text", "test": 20}
    return compared_here(instruct(evaluate_also={"plain": plain}), ["full", "lora"], [0, 1], kept)


def test_plain_text_is_evaluated_before_and_after(comparison):
    data = comparison.data
    assert data["rows"]["plain"] == 20 and data["base"]["metrics"]["plain"]["loss"] > 0
    assert {"loss", "perplexity", "token_accuracy"} <= set(data["arms"]["lora"]["metrics"]["plain"])


def test_the_change_is_paired_with_the_base_by_example(comparison):
    def losses(run):
        rows = pandas.read_parquet(comparison.folder / run / "predictions.parquet")
        rows = rows[rows["split"] == "plain"]
        return rows["id"].tolist(), rows["loss"].to_numpy(), rows["tokens"].to_numpy()

    runs = [losses(f"full/seed-{seed}") for seed in (0, 1)]
    base = losses("base/seed-0")
    assert all(run[0] == base[0] for run in runs)
    expected = paired_difference(np.stack([r[1] for r in runs]), np.stack([base[1]] * 2), weights=base[2].astype(float))
    entry = comparison.data["forgetting"]["plain"]
    change = entry["arms"]["full"]
    assert change["estimate"] == pytest.approx(expected.estimate) and change["ci95"] == pytest.approx(
        list(expected.ci95)
    )
    before, after = comparison.data["base"]["metrics"], comparison.data["arms"]["full"]["metrics"]
    assert change["estimate"] == pytest.approx(after["plain"]["loss"] - before["plain"]["loss"], abs=1e-6)
    assert entry["margin"] == pytest.approx(0.01 * before["plain"]["loss"])


def test_forgetting_is_in_the_table_the_text_and_the_plot(comparison):
    assert "Plain loss" in comparison.table()
    (line,) = forgetting(comparison.data)
    assert line.startswith("Plain loss before tuning") and line.count("95 % interval") == 2
    assert (comparison.folder / "plots" / "forgetting.png").is_file()


def test_an_unreachable_set_is_a_note_and_a_missing_file_is_an_error(instruct, prose):
    task = task_of(instruct(evaluate_also={"plain": {"path": "nobody/nothing", "format": "text"}}))
    made = task.prepare()
    assert "plain" not in made.splits and "Left out: evaluate_also.plain" in " ".join(made.notes)
    with pytest.raises(RecipeError, match=r"evaluate_also\.plain.*is not there"):
        task_of(instruct(evaluate_also={"plain": {"path": "./none.jsonl", "format": "text"}})).prepare()
    with pytest.raises(RecipeError, match="asks for 100"):
        task_of(instruct(evaluate_also={"plain": {"path": str(prose), "text": "body", "test": 100}})).prepare()


def test_causal_recipes_measure_forgetting_and_classifiers_say_why_not(classify, tmp_path):
    for name in ("gpt2-code", "smollm2-alpaca"):
        assert load_recipe(name).evaluate_also["plain"]["path"] == "Salesforce/wikitext"
        shown = load_recipe(name, embedded=True).evaluate_also["plain"]
        assert shown["path"] == "embedded:docstring-text" and shown["name"] is None
    made = compared_here(classify(), ["head"], [0], tmp_path)
    assert "no head for these classes before tuning" in " ".join(made.data["notes"])
    assert made.data["forgetting"] == {}
