"""Text classification of pairs, of several classes and of numbers, against plain transformers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas
import pytest
import torch
import transformers
from problem_types import KINDS, METRIC, NAMES, recipe_of, save_base, write_rows
from small import compared_here
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

from peft_recipes import Arm, Recipe, RecipeError, plan, train
from peft_recipes.data.sources import load_splits
from peft_recipes.recipe.metrics import METRICS
from peft_recipes.tasks.head_trainer import HeadTrainer

TYPES = {"pairs": None, "several": "multi_label_classification", "number": "regression"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("problem-types")


@pytest.fixture(scope="module")
def recipes(root):
    """A recipe of each kind: pairs on a tiny BERT, which has token types, the others on a tiny DistilBERT."""
    bases = {kind: save_base(kind, root / kind) for kind in ("bert", "distilbert")}
    return {
        kind: recipe_of(kind, write_rows(kind, root), bases["bert" if kind == "pairs" else "distilbert"],
                        "bert" if kind == "pairs" else "distilbert", train_sampling_strategy="sequential")
        for kind in KINDS
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(recipes, root):
    """Every arm of every recipe, trained on first use."""
    made = {}

    def run(kind, arm):
        if (kind, arm) not in made:
            made[kind, arm] = train(recipes[kind], arm, output=root / "runs")
        return made[kind, arm]

    return run


def plain_rows(recipe, kind):
    """The training rows as plain transformers takes them, in the order of the recipe's split."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    rows = []
    for row in load_splits(recipe.dataset)["train"]:
        texts = [row["sentence1"], row["sentence2"]] if kind == "pairs" else [row["text"]]
        label = row[recipe.dataset.label]
        label = [float(name in label) for name in NAMES] if kind == "several" else label
        rows.append({**tokenizer(*texts, truncation=True, max_length=recipe.max_length), "labels": label})
    return rows, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_each_steps_loss_equals_a_plain_trainers(recipes, runs, root, kind):
    recipe = recipes[kind]
    rows, tokenizer = plain_rows(recipe, kind)
    transformers.set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        recipe.model, num_labels={"pairs": 2, "several": 3, "number": 1}[kind], problem_type=TYPES[kind],
        dtype=torch.float32,
    )  # fmt: skip
    # One batch of 8 where ours accumulates two of 4: Trainer doubles the loss of two, as BERT's forward takes
    # num_items_in_batch and ignores it.
    training = {**recipe.training, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    arguments = transformers.TrainingArguments(
        str(root / "plain"), **training, learning_rate=recipe.arms["full"].learning_rate, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    plain = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ours = [loss for _, loss in runs(kind, "full").data["training"]["losses"]]
    assert len(ours) == 10 and ours == pytest.approx(plain, rel=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_labels_follows_from_the_data_and_is_in_the_runs_recipe(recipes, runs, kind):
    run = runs(kind, "full")
    resolved = Recipe.from_yaml(run.folder / "recipe.yaml")
    assert recipes[kind].dataset.problem_type is None and resolved.dataset.problem_type == TYPES[kind]
    assert any("hold lists" in note or "regression" in note for note in run.data["notes"]) == (kind != "pairs")
    again = train(resolved, "full", output=run.folder.parents[2] / "again")
    assert again.data["training"]["losses"] == run.data["training"]["losses"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arm", ["full", "head", "lora"])
def test_a_saved_arm_comes_back_with_its_head(runs, kind, arm):
    run = runs(kind, arm)
    assert run.ok and isinstance(run.data["checks"]["reload"], float)
    assert all(not isinstance(value, str) for value in run.data["checks"].values()), run.data["checks"]
    if arm == "full":
        config = transformers.AutoConfig.from_pretrained(run.folder)
        assert config.problem_type == TYPES[kind] and config.num_labels == {"pairs": 2, "several": 3, "number": 1}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_follow_from_the_predictions(runs, kind):
    run = runs(kind, "lora")
    table = pandas.read_parquet(run.folder / "predictions.parquet")
    found = run.metrics["test"]
    assert METRIC[kind] in found
    for name, value in found.items():
        assert table[name].mean() == pytest.approx(value, abs=1e-9), name
    if kind == "several":
        assert [row["label"] for row in run.data["per_class"]] == list(NAMES)
        right = [set(a) == set(b) for a, b in zip(table["label"], table["prediction"], strict=True)]
        assert np.mean(right) == pytest.approx(found["accuracy"])
    if kind == "number":
        assert run.data["per_class"] is None
        assert found["mse"] == pytest.approx(found["loss"]) == pytest.approx(
            ((table["label"] - table["prediction"]) ** 2).mean()
        )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_on_cached_features_equals_one_through_its_backbone(recipes, runs, root, monkeypatch, kind):
    cached = runs(kind, "head")
    assert cached.data["training"]["batches"] == "features"
    monkeypatch.setattr(HeadTrainer, "_pooling", lambda *_: None)
    plain = train(recipes[kind], "head", output=root / "through")
    losses = [[loss for _, loss in run.data["training"]["losses"]] for run in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert cached.metrics["test"][METRIC[kind]] == pytest.approx(plain.metrics["test"][METRIC[kind]], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_arms_are_compared_by_a_metric_that_is_no_mean(recipes, root, kind):
    compared = compared_here(recipes[kind], ["full", "lora"], [0], root / "runs")  # those that `runs` trained, too
    arms, difference = compared.data["arms"], compared.data["differences"]["lora"]
    assert compared.data["metric"] == METRIC[kind] and compared.data["margin"] == 0.01
    lora, full = (arms[arm]["metrics"]["test"][METRIC[kind]] for arm in ("lora", "full"))
    low, high = difference["ci95"]
    assert difference["estimate"] == pytest.approx(lora - full, abs=1e-9) and low <= difference["estimate"] <= high
    assert "points" in compared.verdict("lora") and METRICS[METRIC[kind]].title in compared.table()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_tries_a_step_of_each_kind(recipes, kind):
    planned = plan(recipes[kind], ["full", "lora"], trial=True)["arms"]
    assert all(arm["memory"]["total"] > 0 and arm["steps"] == 10 for arm in planned.values())


def test_pairs_have_token_types_only_where_the_model_takes_them(recipes, root):
    from peft_recipes.tasks.registry import task_of

    row = task_of(recipes["pairs"]).prepare().splits["train"][0]
    assert set(row["token_type_ids"]) == {0, 1}
    other = dataclasses.replace(recipes["pairs"], model=str(root / "distilbert"), arms={"full": Arm(learning_rate=1.0)})
    prepared = task_of(other).prepare()
    assert prepared.splits["train"].column_names == ["labels", "input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("number", {"metric": "accuracy"}, "--set metric=pearson (possible: pearson, spearman, mse, loss)"),
        ("several", {"metric": "mcc"}, "--set metric=micro_f1"),
        ("pairs", {"metric": "micro_f1"}, "--set metric=accuracy"),
        ("number", {"training": {"label_smoothing_factor": 0.1}}, "only one class per text can be smoothed"),
        ("number", {"training": {"metric_for_best_model": "eval_mcc"}}, "training.metric_for_best_model"),
        ("number", {"metric": "loss", "dataset": {"problem_type": "single_label_classification"}},
         "a label is a whole number or text"),
        ("pairs", {"metric": "pearson", "dataset": {"problem_type": "regresion"}}, "Did you mean 'regression'"),
        ("pairs", {"dataset": {"text": ["sentence1", "sentense2"]}}, "Did you mean 'sentence2'"),
        ("pairs", {"dataset": {"text": ["sentence1"]}}, "the two columns of a pair"),
        ("pairs", {"task": "language-modeling", "metric": "loss"}, "is for text-classification"),
        ("several", {"dataset": {"balance": True}}, "needs one class per example"),
        ("number", {"dataset": {"problem_type": "regression", "labels": ["a", "b"]}}, "no class names"),
        ("pairs", {"metric": "pearson2"}, "Did you mean 'pearson'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_labels_is_named_before_anything_is_trained(recipes, tmp_path, kind, changes, message):
    with pytest.raises(RecipeError) as raised:
        train(recipes[kind].with_changes(changes), "full", output=tmp_path)
    assert message in str(raised.value), str(raised.value)
