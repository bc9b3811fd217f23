"""reproduce: equal metrics under the same conditions, within an interval under others, else exit code 1."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas
import pytest
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from peft_recipes import base_folder, reproduce, train
from peft_recipes.cli.app import app
from peft_recipes.publishing.tolerance import NOISE, changed_conditions, compare_metrics, example_scores
from peft_recipes.tasks import example_scores as example_scores_of
from peft_recipes.tasks import metrics
from peft_recipes.tasks.metrics import per_class


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def own(classify, runs, tmp_path):
    """A copy of a run's folder; trained once."""
    folder = runs / "tiny" / "lora" / "seed-0"
    if not folder.exists():
        train(classify(), "lora", output=runs)
    return shutil.copytree(folder, tmp_path / "pulled")


def edit(folder, change) -> None:
    """Changes its run.json."""
    data = json.loads((folder / "run.json").read_text())
    change(data)
    (folder / "run.json").write_text(json.dumps(data))


def call(*words):
    return CliRunner().invoke(app, ["reproduce", *map(str, words)])


def test_on_the_same_machine_the_metrics_are_equal(own, tmp_path):
    done = call(own, "--output", tmp_path / "again", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["held"] and result["same_conditions"] and result["differs"] == []
    found = {(row["split"], row["metric"]): row for row in result["rows"]}
    evidence = json.loads((own / "run.json").read_text())
    assert found["test", "accuracy"]["here"] == evidence["metrics"]["test"]["accuracy"]
    assert found["test", "loss"]["here"] == pytest.approx(evidence["metrics"]["test"]["loss"], rel=NOISE)
    assert found["training", "steps"]["held"] and ("validation", "loss") in found
    assert (tmp_path / "again" / "tiny" / "lora" / "seed-0" / "adapter_model.safetensors").is_file()
    again = call(own, "--output", tmp_path / "again")
    assert again.exit_code == 2 and "holds a run already" in again.stderr


def test_a_metric_that_differs_is_exit_code_1_and_a_table(own):
    edit(own, lambda data: data["metrics"]["test"].update(loss=data["metrics"]["test"]["loss"] * 1.1))
    done = call(own)
    assert done.exit_code == 1, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("test loss"))
    assert "DOES NOT" in line and "Not reproduced." in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("test accuracy"))
    assert "holds" in line


def test_on_another_machine_the_bootstrap_interval_decides(own):
    def elsewhere(data):
        data["environment"]["versions"]["torch"] = "1.0"
        data["environment"]["device_name"] = "another"

    edit(own, elsewhere)
    found = reproduce(own)
    assert found.held and found.folder is None
    assert any(line.startswith("torch: 1.0, here ") for line in found.differs)
    row = {(row.split, row.metric): row for row in found.rows}
    low, high = row["test", "accuracy"].bounds
    assert low < row["test", "accuracy"].evidence < high
    assert row["validation", "accuracy"].held is None  # its examples are not stored
    edit(own, lambda data: data["metrics"]["test"].update(accuracy=0.1))
    made = reproduce(own)
    assert not made.held and "its own predictions.parquet gives" in made.doubts[0]


def test_on_another_machine_without_predictions_nothing_is_confirmed(own):
    edit(own, lambda data: data["environment"].update(python="3.0"))
    (own / "predictions.parquet").unlink()
    found = reproduce(own)
    assert not found.held and "how near is near" in found.doubts[0]


def test_a_full_fine_tune_can_be_reproduced(classify, tmp_path):
    run = train(classify(), "full", output=tmp_path / "first")
    assert reproduce(run.folder).held


@pytest.fixture
def pictures(tmp_path):
    """A recipe on images that are bright at the top or at the bottom, whose base is trained first."""
    from peft import LoraConfig
    from PIL import Image

    from peft_recipes import Arm, Dataset, Pretraining, Recipe

    draw = np.random.default_rng(0)
    for i in range(96):
        pixels = draw.integers(0, 120, size=(28, 28))
        pixels[(slice(0, 14), slice(14, 28))[i % 2]] += 100
        path = tmp_path / "pictures" / ("above", "below")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return Recipe(
        name="pictures", task="image-classification", model="small-cnn",
        pretraining=Pretraining(num_train_epochs=1, batch_size=16),
        dataset=Dataset(str(tmp_path / "pictures"), pretrain=32, train=32, validation=12, test=20),
        training={"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True},
        arms={"lora": Arm(LoraConfig(r=2, target_modules=["fc1", "classifier"]), learning_rate=1e-3)},
    )  # fmt: skip


def test_a_cached_base_and_one_trained_again_give_the_same_metrics(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_RECIPES_CACHE", str(tmp_path / "cache"))
    run = train(pictures, "lora", output=tmp_path / "first")  # trains its base
    for cache in ("cache", "another"):  # finds it made; trains it again
        monkeypatch.setenv("PEFT_RECIPES_CACHE", str(tmp_path / cache))
        found = reproduce(run.folder)
        assert found.held and not found.differs
        assert all(row.here == pytest.approx(row.evidence, rel=1e-6) for row in found.rows), cache
    assert AutoModelForImageClassification.from_pretrained(base_folder(run.folder)).config.num_labels == 2


def test_user_mistakes_are_one_line(own, runs, tmp_path, monkeypatch):
    def refused(message, *words):
        done = call(*words)
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1

    refused("is no folder here and can't be a repository", tmp_path / "nowhere")
    refused("is no folder here and can't be a repository", "some name/x")
    refused("has no run.json", tmp_path)
    refused("Unknown key 'trainng'", own, "--set", "trainng.max_steps=1")
    refused("is a file", own, "--output", own / "run.json")
    refused("the evidence itself lies there", runs / "tiny" / "lora" / "seed-0", "--output", runs)
    (tmp_path / "comparison.json").write_text("{}")
    refused("is a comparison", tmp_path)
    edit(own, lambda data: data.update(arm="lroa"))
    refused("Did you mean 'lora'", own)
    edit(own, lambda data: data.update(status="failed"))
    refused("not a finished one", own)
    (own / "run.json").write_text("{")
    refused("can't be read", own)


def test_a_downloaded_recipe_can_not_switch_remote_code_on(own):
    from peft_recipes.publishing.reproduce import _read_evidence, _recipe_for_this_machine

    path = own / "recipe.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert _recipe_for_this_machine(own, _read_evidence(own), [], False).trust_remote_code is False
    assert _recipe_for_this_machine(own, _read_evidence(own), [], True).trust_remote_code is True


# --- tolerances -------------------------------------------------------------------------------------------------------


def predictions(count=400, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(3, size=count)
    guesses = np.where(draw.random(count) < 0.8, labels, draw.integers(3, size=count))
    losses = draw.exponential(0.5, size=count)
    return pandas.DataFrame({"split": "test", "label": labels, "prediction": guesses, "loss": losses})


def evidence(table):
    report = {"per_class": per_class(table["prediction"], table["label"], ["a", "b", "c"])}
    accuracy = float((table["label"] == table["prediction"]).mean())
    f1 = float(np.mean([row["f1"] for row in report["per_class"]]))
    return {"test": {"accuracy": accuracy, "macro_f1": f1, "loss": float(table["loss"].mean())}}


def test_intervals_have_their_nominal_coverage():
    """Metrics on other test examples from the same distribution are inside 19 times in 20, or slightly less."""
    truth, inside = evidence(predictions(40_000, seed=99)), {"accuracy": 0, "macro_f1": 0, "loss": 0}
    for seed in range(30):
        table = predictions(seed=seed)
        for row in compare_metrics(evidence(table), truth, table, "text-classification", same_conditions=False):
            inside[row.metric] += bool(row.held)
    assert all(26 <= times <= 30 for times in inside.values()), inside


def test_equal_allows_float_noise_and_one_example():
    table = predictions()
    original = evidence(table)
    value = original["test"]

    def held(**changes):
        found = compare_metrics(
            original, {"test": {**value, **changes}}, table, "text-classification", same_conditions=True
        )
        return all(row.held for row in found)

    assert held() and held(loss=value["loss"] * (1 + NOISE / 2)) and held(accuracy=value["accuracy"] + 1 / 400)
    assert not held(loss=value["loss"] * (1 + 2 * NOISE)) and not held(accuracy=value["accuracy"] - 2 / 400)
    assert not held(accuracy=None)


def test_an_accuracy_of_1_allows_3_errors_in_n():
    table = predictions().assign(prediction=lambda t: t["label"])
    found = compare_metrics(
        {"test": {"accuracy": 1.0}}, {"test": {"accuracy": 0.995}}, table, "text-classification", same_conditions=False
    )
    assert found[0].held and found[0].bounds[0] == pytest.approx(1 - 3 / 400, abs=1e-4)


def test_the_loss_of_a_causal_model_is_weighted_by_tokens():
    table = pandas.DataFrame({"split": "test", "loss": [1.0, 3.0], "tokens": [3, 1], "correct_tokens": [3, 0]})
    values, weights = example_scores(table, "loss", "sft")
    assert (values * weights).sum() / weights.sum() == 1.5
    values, weights = example_scores(table, "token_accuracy", "sft")
    assert (values * weights).sum() / weights.sum() == 0.75
    before, now = {"loss": 1.5, "perplexity": np.exp(1.5)}, {"loss": 1.6, "perplexity": 5.0}
    found = compare_metrics({"test": before}, {"test": now}, table, "sft", same_conditions=False)
    assert found[1].bounds == pytest.approx(np.exp(found[0].bounds))


def test_changed_conditions_are_named():
    here = {"device": "cpu", "threads": 2, "versions": {"torch": "2.13.0", "peft": "0.21.2"}}
    assert changed_conditions(here, here) == []
    was = {**here, "threads": 4, "versions": {"torch": "2.12.0", "peft": "0.21.2"}, "dataset_fingerprint": "x"}
    assert changed_conditions(was, here) == ["threads: 4, here 2", "torch: 2.12.0, here 2.13.0", "data: x, here None"]


def test_the_figures_of_answers_have_intervals_over_the_answered_examples():
    random = np.random.default_rng(0)
    table = pandas.DataFrame({
        "split": "test", "loss": random.random(30), "tokens": 5, "rougeL": [*random.random(20), *[None] * 10],
        "answer": ["x", ""] * 10 + [None] * 10, "ended": [True, False] * 10 + [None] * 10,
        "answer_tokens": [*random.integers(1, 9, 20), *[None] * 10],
    })  # fmt: skip
    answered = table.iloc[:20]
    metrics = {
        "loss": table["loss"].mean(), "bits_per_byte": 2 * table["loss"].mean(), "rougeL": answered["rougeL"].mean(),
        "ended": 0.5, "empty_answers": 0.5, "answer_tokens": answered["answer_tokens"].mean(),
    }  # fmt: skip
    found = compare_metrics({"test": metrics}, {"test": metrics}, table, "sft", same_conditions=False)
    assert all(row.held for row in found)
    loss, bits = (next(row.bounds for row in found if row.metric == name) for name in ("loss", "bits_per_byte"))
    assert bits == pytest.approx([2 * bound for bound in loss])


def test_metrics_that_are_no_means_over_examples_have_intervals_and_float_noise():
    random = np.random.default_rng(0)
    labels = random.normal(size=200)
    guesses = labels + random.normal(size=200)
    classes, guessed = (labels > 0).astype(int), (guesses > 0).astype(int)
    for measure, score, arrays in (
        (metrics.regression_metrics, example_scores_of.regression_scores, (guesses, labels)),
        (metrics.class_metrics, example_scores_of.class_scores, (guessed, classes)),
    ):
        found, table = measure(*arrays), pandas.DataFrame({"split": "test", **score(*arrays)})
        for same in (True, False):
            rows = compare_metrics({"test": found}, {"test": found}, table, "text-classification", same)
            assert {row.metric for row in rows} == set(found) and all(row.held for row in rows)
        wide = {row.metric: row.bounds for row in rows}
        assert all(0.01 < high - low < 0.5 for low, high in (wide[name] for name in found if name != "mse")), wide
        far = {name: value - 0.5 for name, value in found.items()}
        assert not any(
            row.held for row in compare_metrics({"test": found}, {"test": far}, table, "text-classification", False)
        )
