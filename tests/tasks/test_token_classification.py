"""Token classification: the losses of a plain Trainer, saved heads that come back, entity F1 as a paired comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import transformers
from peft import PeftModel
from seqeval.metrics import f1_score
from small import compared_here, tokenizer
from tagged import TAGS, base_with, bytelevel, tag_recipe, tagged, without_dropout, wordpiece, written
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification
from typer.testing import CliRunner

from peft_recipes import Dataset, RecipeError, train
from peft_recipes.cli.app import app
from peft_recipes.models.quantisation import TOLERANCE
from peft_recipes.publishing.tolerance import compare_metrics
from peft_recipes.tasks.registry import task_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return written(tmp_path_factory.mktemp("tagged") / "sentences.jsonl", tagged(160))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A DistilBERT whose tokenizer cuts words into pieces, without dropout."""
    root = tmp_path_factory.mktemp("bases")
    return without_dropout(base_with(wordpiece(), "distilbert", root / "with"), root / "without")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A GPT-2 wide enough to be quantised."""
    return base_with(tokenizer(), "gpt2", tmp_path_factory.mktemp("bases") / "gpt2", width=64)


@pytest.fixture(scope="module")
def recipe(base, data):
    return tag_recipe(base, data)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A comparison of all arms."""
    return compared_here(recipe, list(recipe.arms), [0], tmp_path_factory.mktemp("compared"))


def plain_losses(recipe, base, **options):
    """The losses of every step of transformers' own Trainer and collator, fully fine-tuned."""
    prepared = task_of(recipe).prepare()
    transformers.set_seed(0)
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: i for i, tag in enumerate(TAGS)}}
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=len(TAGS), **names)
    model.config.pad_token_id = prepared.processor.pad_token_id
    arguments = transformers.TrainingArguments(
        "unused", **{**recipe.training, **options}, learning_rate=recipe.arms["full"].learning_rate, seed=0,
        data_seed=0, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=prepared.splits["train"],
        data_collator=DataCollatorForTokenClassification(prepared.processor),
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def losses_of(run):
    return [loss for _, loss in run.data["training"]["losses"]]


def test_every_step_has_the_loss_of_a_plain_trainer(recipe, base, trained, tmp_path):
    run = train(recipe, "full", output=tmp_path)
    assert losses_of(run) == pytest.approx(plain_losses(recipe, base), rel=1e-4)
    assert len(losses_of(run)) == 48 and losses_of(run)[-1] < losses_of(run)[0] / 2


def test_accumulated_batches_have_the_loss_of_one_large_batch(data, tmp_path):
    base = without_dropout(base_with(tokenizer(), "llama", tmp_path / "with"), tmp_path / "without")
    losses = {}
    for size, accumulation in ((8, 1), (2, 4)):
        recipe = tag_recipe(base, data, "llama")
        recipe.training |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
                            "train_sampling_strategy": "sequential", "num_train_epochs": 1}  # fmt: skip
        losses[size] = losses_of(train(recipe, "full", output=tmp_path / str(size)))
    assert losses[2] == pytest.approx(losses[8], rel=1e-4)
    # Plain transformers has it for one batch a step alone: its model takes the mean of each micro-batch.
    one_batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert losses[2] == pytest.approx(plain_losses(recipe, base, **one_batch), rel=1e-4)


@pytest.mark.parametrize("arm", ["full", "head", "lora"])
def test_every_arm_learns_and_its_checkpoint_gives_the_same_tags(trained, arm):
    run = trained.runs[arm, 0] if hasattr(trained, "runs") else None
    entry = trained.data["arms"][arm]
    assert entry["status"] == "ok" and not entry["failed_checks"], entry
    assert entry["metrics"]["test"]["entity_f1"] > trained.data["base"]["metrics"]["test"]["entity_f1"]
    assert run is None or run.ok


def test_a_reloaded_adapter_has_the_logits_of_the_trained_one_at_every_token(recipe, base, trained):
    folder = trained.folder / "lora" / "seed-0"
    task = task_of(recipe)
    prepared = task.prepare()
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=len(TAGS))
    model = PeftModel.from_pretrained(model, folder).eval()
    predictions = pandas.read_parquet(folder / "predictions.parquet")
    for i, batch in enumerate(task.inputs(prepared, 10)):
        with torch.no_grad():
            best = model(**batch).logits[0].argmax(-1)
        labelled = [p for p, label in enumerate(prepared.splits["test"][i]["labels"]) if label != -100]
        assert [TAGS[best[p]] for p in labelled] == list(predictions["prediction"][i])


def test_predictions_have_words_tags_and_pseudo_values_whose_mean_is_the_metric(trained):
    folder = trained.folder / "lora" / "seed-0"
    rows = pandas.read_parquet(folder / "predictions.parquet")
    metrics = json.loads((folder / "run.json").read_text())["metrics"]["test"]
    assert all(len(r.words) == len(r.label) == len(r.prediction) == r.tokens for r in rows.itertuples())
    references, predictions = ([list(tags) for tags in rows[key]] for key in ("label", "prediction"))
    assert metrics["entity_f1"] == pytest.approx(f1_score(references, predictions))
    for name in ("entity_f1", "entity_precision", "entity_recall"):
        assert rows[name].mean() == pytest.approx(metrics[name])
    for name in ("loss", "token_accuracy"):
        assert np.average(rows[name], weights=rows["tokens"]) == pytest.approx(metrics[name], rel=1e-5)
    assert metrics["token_accuracy"] == rows["correct_tokens"].sum() / rows["tokens"].sum()


def test_arms_are_compared_by_paired_entity_f1(trained):
    difference = trained.data["differences"]["lora"]
    arms = trained.data["arms"]
    gap = arms["lora"]["metric"]["mean"] - arms["full"]["metric"]["mean"]
    assert trained.data["metric"] == "entity_f1" and difference["estimate"] == pytest.approx(gap)
    assert difference["ci95"][0] <= gap <= difference["ci95"][1] and difference["verdict"]
    assert [row["label"] for row in arms["lora"]["per_class"]] == ["BAD", "GOOD"]


@pytest.mark.parametrize("metric", ["loss", "token_accuracy"])
def test_arms_can_be_compared_by_other_metrics(recipe, trained, tmp_path, metric):
    from peft_recipes.runs.folder import Run, read_run
    from peft_recipes.statistics.scores import scores

    run = read_run(trained.folder / "lora" / "seed-0")
    _, values, weights = scores(Run(run.folder, run.data), recipe, metric=metric)
    assert np.average(values, weights=weights) == pytest.approx(run.metrics["test"][metric], rel=1e-5)


def test_a_reproduction_compares_every_metric(trained):
    folder = trained.folder / "lora" / "seed-0"
    metrics = {"test": json.loads((folder / "run.json").read_text())["metrics"]["test"]}
    rows = pandas.read_parquet(folder / "predictions.parquet")
    for same in (True, False):
        compared = compare_metrics(metrics, metrics, rows, "token-classification", same)
        assert len(compared) == 5 and all(row.held for row in compared)


def test_the_words_of_local_data_are_not_pushed(trained):
    import io

    from peft_recipes.publishing.push import run_files
    from peft_recipes.runs.folder import read_run

    files, left_out = run_files(read_run(trained.folder / "lora" / "seed-0"), "me/tagger")
    sent = pandas.read_parquet(io.BytesIO(files["predictions.parquet"]))
    assert "words" not in sent and {"label", "prediction", "entity_f1"} <= set(sent)
    assert left_out["words in predictions.parquet"] == "they are texts of local data"


def test_words_behind_max_length_are_counted(recipe):
    import dataclasses

    prepared = task_of(dataclasses.replace(recipe, max_length=7)).prepare()
    note = next(note for note in prepared.notes if "train words" in note)
    assert "are behind max_length 7" in note and max(map(len, prepared.splits["train"]["input_ids"])) == 7


def test_parts_of_speech_are_compared_by_token_accuracy(base, tmp_path):
    names = {"O": "NOUN", "B": "VERB", "I": "ADJ"}
    rows = [{"tokens": r["tokens"], "tags": [names[tag[0]] for tag in r["ner_tags"]]} for r in tagged(160)]
    data = written(tmp_path / "pos.jsonl", rows)
    with pytest.raises(RecipeError, match=r"mark no entities.*--set metric=token_accuracy"):
        task_of(tag_recipe(base, data)).prepare()
    run = train(tag_recipe(base, data, metric="token_accuracy"), "full", output=tmp_path)
    assert "entity_f1" not in run.metrics["test"] and run.metrics["test"]["token_accuracy"] > 0.6
    assert {row["label"] for row in run.data["per_class"]} == {"NOUN", "VERB", "ADJ"}


@pytest.mark.parametrize("make", [bytelevel, tokenizer], ids=["byte-level", "words"])
def test_a_decoder_tags_words(make, data, tmp_path):
    base = base_with(make(), "gpt2", tmp_path / "base")
    head = train(tag_recipe(base, data, "gpt2"), "head", output=tmp_path)
    assert head.ok and head.data["parameters"]["trainable"] == 33 * len(TAGS)
    run = train(tag_recipe(base, data, "gpt2"), "lora", output=tmp_path)
    assert run.ok and run.data["checks"]["reload"] < 1e-4 and run.metrics["test"]["entity_f1"] > 0


@pytest.mark.parametrize(
    "name", ["ia3", "adalora", "bitfit", "prompt-tuning", "prefix-tuning", "p-tuning", "lora-int8"]
)
def test_methods_of_every_kind_train_and_reload(decoder, data, tmp_path, name):
    recipe = tag_recipe(decoder, data, "gpt2", dataset=Dataset(str(data), train=24, validation=8, test=8))
    recipe.training |= {"max_steps": 3, "eval_strategy": "no"}
    run = train(recipe, name, output=tmp_path)
    assert run.data["checks"]["learning"] is True and run.data["checks"]["frozen"] is True
    assert run.data["checks"]["reload"] <= (TOLERANCE["int8"] if name == "lora-int8" else 1e-4)
    assert run.data["parameters"]["head"] == 65 * len(TAGS)


@pytest.mark.parametrize("name", ["adaption-prompt", "trainable-tokens"])
def test_methods_that_save_no_head_are_refused(decoder, data, tmp_path, name):
    with pytest.raises(RecipeError, match="PEFT saves no classification head with it"):
        train(tag_recipe(decoder, data, "gpt2"), name, output=tmp_path)


def test_a_slow_tokenizer_is_refused():
    from types import SimpleNamespace

    from peft_recipes.data.words import check_fast

    with pytest.raises(RecipeError, match=r"model 'm': its tokenizer \(SimpleNamespace\) has no fast version"):
        check_fast(SimpleNamespace(is_fast=False), "m")


# --- the command line ------------------------------------------------------------------------------------------------


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


WRONG = {
    "2 tokens in 'tokens' and 1 tags": {"tokens": ["a", "b"], "ner_tags": ["O"]},
    "expected a list of tokens": {"tokens": ["a", None], "ner_tags": ["O", "O"]},
    "Unknown tag 'B-GOD'": {"tokens": ["a"], "ner_tags": ["B-GOD"]},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_row_is_one_line_and_exit_code_2(base, tmp_path, message):
    data = written(tmp_path / "wrong.jsonl", [*tagged(30), WRONG[message]])
    tag_recipe(base, data, dataset=Dataset(str(data), labels=TAGS)).to_yaml(tmp_path / "wrong.yaml")
    done = call("train", tmp_path / "wrong.yaml", "--arm", "full", "--output", tmp_path)
    shown = " ".join(done.output.split())
    assert done.exit_code == 2 and message in shown and "row train-30" in shown and "Traceback" not in shown


def test_plan_counts_the_head_and_the_steps(recipe, tmp_path):
    recipe.to_yaml(tmp_path / "tags.yaml")
    plan = json.loads(call("plan", tmp_path / "tags.yaml", "--json").stdout)
    assert plan["arms"]["head"]["trainable_parameters"] == 33 * len(TAGS)
    assert plan["arms"]["lora"]["steps"] == 48 and plan["arms"]["lora"]["memory"]["played"]


def test_the_adapter_is_checked_merged_and_evaluated(trained, tmp_path):
    folder = trained.folder / "lora" / "seed-0"
    assert call("check", folder).exit_code == 0
    assert call("merge", folder, "--output", tmp_path / "merged").exit_code == 0
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    evaluated = json.loads(call("evaluate", folder, "--json").stdout)
    assert json.dumps(evaluated).count("entity_f1")
    assert merged.config.id2label == dict(enumerate(TAGS)) and Path(tmp_path / "merged" / "tokenizer.json").is_file()
