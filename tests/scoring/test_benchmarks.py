"""Benchmarks: lm_eval on the model in memory equals lm_eval's own command on the saved folder, example by example."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas
import pytest
from benchmark_files import choices
from small import compared_here

from peft_recipes.reporting.sentences import forgetting


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A multiple choice task of 24 questions, with its data beside it."""
    return choices(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("compared")


@pytest.fixture
def comparison(instruct, words, kept):
    """Full and lora, one seed, with the benchmark; trained once."""
    return compared_here(instruct(benchmarks=[str(words)], benchmark_examples=20), ["full", "lora"], [0], kept)


def rows(folder) -> pandas.DataFrame:
    """The benchmark's rows in a run's predictions."""
    table = pandas.read_parquet(folder / "predictions.parquet")
    return table[table["split"] == "words"].reset_index(drop=True)


def test_the_values_are_those_of_lm_eval_on_the_saved_folder(comparison, words, tiny, tmp_path):
    models = {
        "full": f"pretrained={comparison.folder / 'full' / 'seed-0'}",
        "lora": f"pretrained={tiny('llama')},peft={comparison.folder / 'lora' / 'seed-0'}",
    }
    started = {}
    for arm, model in models.items():  # beside the task's file, where lm_eval finds its data
        command = ["-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", str(words), "--limit", "20"]
        command += ["--device", "cpu", "--log_samples", "--output_path", str(tmp_path / arm)]
        log = (tmp_path / f"{arm}.txt").open("w")
        started[arm] = subprocess.Popen([sys.executable, *command], cwd=words.parent, stdout=log, stderr=log)
    for arm, process in started.items():
        assert process.wait() == 0, (tmp_path / f"{arm}.txt").read_text()[-2000:]
        (samples,) = (tmp_path / arm).rglob("samples_*.jsonl")
        theirs = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        ours = rows(comparison.folder / arm / "seed-0")
        assert ours["id"].tolist() == [str(row["doc_id"]) for row in theirs]
        assert ours["acc"].tolist() == [row["acc"] for row in theirs]
        (file,) = (tmp_path / arm).rglob("results_*.json")
        total = json.loads(file.read_text())["results"]["words"]
        metrics = comparison.data["arms"][arm]["metrics"]["words"]
        for metric in ("acc", "acc_norm"):
            assert metrics[metric] == pytest.approx(total[f"{metric},none"], abs=1e-12)
        assert metrics["brier_score"] == pytest.approx(total["brier_score,none"], abs=1e-5)  # of probabilities


def test_each_run_is_compared_with_the_base_by_example(comparison):
    entry = comparison.data["forgetting"]["words"]
    assert (entry["metric"], entry["higher_is_better"], entry["margin"]) == ("acc", True, 0.01)
    base = rows(comparison.folder / "base" / "seed-0")["acc"]
    for arm, change in entry["arms"].items():
        after = rows(comparison.folder / arm / "seed-0")["acc"]
        assert change["estimate"] == pytest.approx((after - base).mean())
        assert change["ci95"][0] <= change["estimate"] <= change["ci95"][1]
        assert change["examples"] == 20
    facts = json.loads((comparison.folder / "lora" / "seed-0" / "run.json").read_text())["benchmarks"]["words"]
    assert facts["metric"] == "acc" and facts["examples"] == 20 and facts["tasks"] == ["words"]


def test_it_is_in_the_table_the_text_and_the_plot(comparison):
    assert "Words accuracy" in comparison.table()
    (line,) = forgetting(comparison.data)
    assert line.startswith("Words accuracy before tuning") and line.count("95 % interval") == 2 and "points" in line
    assert (comparison.folder / "plots" / "forgetting.png").is_file()
