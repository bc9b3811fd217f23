"""The metrics against sklearn and arithmetic, with no Hub and no folder to write to."""

import math
import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, classification_report, f1_score

from peft_recipes import metrics
from peft_recipes.errors import RecipeError

# rows for each metric, as a user of evaluate.load gives them, and one value of the result
EXAMPLES = {
    "accuracy": (dict(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2]), 0.75),
    "macro_f1": (dict(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2]), (1 + 2 / 3 + 2 / 3) / 3),
    "perplexity": (dict(losses=[math.log(2), math.log(8)], tokens=[2, 1]), 2 ** (5 / 3)),
    "preference_accuracy": (dict(margins=[2.0, -1.0, 0.0, 0.1, -0.1], tie=0.0), 2.5 / 5),
    "token_accuracy": (dict(correct=[1, 9], tokens=[2, 10]), 10 / 12),
}


@pytest.fixture
def guesses():
    random = np.random.default_rng(0)
    references = random.choice(5, size=300, p=[0.6, 0.2, 0.1, 0.08, 0.02])
    return np.where(random.random(300) < 0.7, references, random.integers(0, 5, size=300)), references


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_metric_gives_the_value_worked_out_by_hand(name):
    inputs, value = EXAMPLES[name]
    assert metrics.compute(name, **inputs)[name] == pytest.approx(value, rel=1e-12)


def test_accuracy_and_macro_f1_are_those_of_sklearn(guesses):
    predictions, references = guesses
    assert metrics.compute("accuracy", predictions=predictions, references=references) == {
        "accuracy": accuracy_score(references, predictions)
    }
    tensors = dict(predictions=torch.tensor(predictions), references=torch.tensor(references))
    macro = metrics.compute("macro_f1", **tensors)
    assert macro == {"macro_f1": pytest.approx(f1_score(references, predictions, average="macro"))}


def test_the_per_class_report_is_that_of_sklearn(guesses):
    predictions, references = guesses
    labels = ["ham", "spam", "eggs", "milk", "tea"]
    rows = metrics.compute("per_class", predictions=predictions, references=references, labels=labels)["per_class"]
    expected = classification_report(references, predictions, target_names=labels, output_dict=True)
    assert [row["label"] for row in rows] == labels
    for row in rows:
        report = expected[row["label"]]
        assert row["precision"] == report["precision"] and row["recall"] == report["recall"]
        assert row["f1"] == report["f1-score"] and row["support"] == report["support"]


def test_a_class_without_examples_has_zeros_and_is_listed_where_labels_are_given():
    inputs = dict(predictions=[0, 0], references=[0, 2])
    rows = metrics.compute("per_class", **inputs, labels=["a", "b", "c"])["per_class"]
    assert rows[1] == {"label": "b", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert rows[2] == {"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert [row["label"] for row in metrics.compute("per_class", **inputs)["per_class"]] == ["0", "2"]
    with pytest.raises(ValueError, match="from 0 to 2, but there are 2 labels"):
        metrics.compute("per_class", **inputs, labels=["a", "b"])


def test_perplexity_weighs_tokens_not_examples_and_passes_over_examples_without_tokens():
    result = metrics.compute("perplexity", losses=[1.0, 4.0, math.nan], tokens=[30, 10, 0])
    assert result == {"perplexity": pytest.approx(math.exp(1.75)), "loss": pytest.approx(1.75), "tokens": 40}
    assert metrics.compute("perplexity", losses=[1000.0], tokens=[1])["perplexity"] == math.inf
    with pytest.raises(ValueError, match="at least one labelled token"):
        metrics.compute("perplexity", losses=[1.0], tokens=[0])


def test_more_correct_tokens_than_tokens_is_an_error():
    with pytest.raises(ValueError, match="never more correct tokens than there are"):
        metrics.compute("token_accuracy", correct=[3, 0], tokens=[2, 5])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"predictions": [1]}, "needs predictions and references; got no references"),
        ({"predictions": [1, 0], "references": [1]}, "as many of each"),
        ({"predictions": [], "references": []}, "at least one"),
    ],
)
def test_missing_unequal_and_empty_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        metrics.compute("accuracy", **inputs)


def test_a_misspelt_metric_names_the_nearest():
    for ask in (metrics.load, metrics.path, metrics.compute):
        with pytest.raises(RecipeError, match=r"Unknown metric 'acuracy'.*Did you mean 'accuracy'\?"):
            ask("acuracy")


def test_a_metric_that_raised_does_not_carry_rows_into_the_next_result():
    with pytest.raises(ValueError):
        metrics.load("accuracy").compute(predictions=[0, 0, 0], references=[1, 1])
    assert metrics.compute("accuracy", predictions=[1], references=[1]) == {"accuracy": 1.0}


def test_batches_may_be_added_one_after_another():
    metric = metrics.load("token_accuracy")
    metric.add_batch(correct=[1], tokens=[2])
    metric.add_batch(correct=[0, 2], tokens=[2, 4])
    assert metric.compute() == {"token_accuracy": 3 / 8, "tokens": 8}


def test_evaluate_loads_every_script_by_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in metrics.NAMES:
        inputs, _ = EXAMPLES.get(name, EXAMPLES["accuracy"])
        metric = evaluate.load(metrics.path(name), cache_dir=str(tmp_path / "metrics"))
        assert metric.compute(**inputs) == metrics.compute(name, **inputs)
        assert type(metric).__module__.startswith("evaluate_modules")  # a copy, not the class this package imports


def test_two_processes_at_once_need_no_hub_and_no_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").touch()  # a folder below a file can't be made, by root either
    environment = {**os.environ, "HF_HOME": str(tmp_path / "file" / "home"), "HF_HUB_OFFLINE": "1"}
    code = (
        "from peft_recipes import metrics\n"
        "for _ in range(40):\n"
        "    print(metrics.compute('accuracy', predictions=[1, 0], references=[1, 1])['accuracy'], flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as other:
        theirs = [other.stdout.readline()]  # it has begun
        ours = {metrics.compute("accuracy", predictions=[1, 1], references=[1, 1])["accuracy"] for _ in range(40)}
        theirs += other.stdout.readlines()
    assert other.returncode == 0
    assert ours == {1.0} and theirs == ["0.5\n"] * 40
