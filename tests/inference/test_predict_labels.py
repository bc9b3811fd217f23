"""predict, check, merge and the card's code, for adapters that predict pairs, several labels or a number."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest
import torch
from card_code import code_in
from peft import LoraConfig, PeftModel
from problem_types import KINDS, METRIC, NAMES, recipe_of, rows, save_base, write_rows
from saved_adapters import saved
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from peft_recipes import reproduce, train
from peft_recipes.adapters.check import check_adapter
from peft_recipes.adapters.merge import merge_adapter
from peft_recipes.cli.app import app
from peft_recipes.inference.predict import Predictor

OUTPUTS = {"pairs": 2, "several": 3, "number": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("predict-labels")


@pytest.fixture(scope="module")
def runs(root):
    """A LoRA adapter of each kind, trained."""
    base = save_base("distilbert", root / "base")
    return {
        kind: train(recipe_of(kind, write_rows(kind, root), base, num_train_epochs=4), "lora", output=root).folder
        for kind in KINDS
    }


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def texts_of(kind, count=3):
    return [[row["sentence1"], row["sentence2"]] if kind == "pairs" else [row["text"]] for row in rows(kind)[:count]]


def plain_logits(folder, root, kind, texts):
    """The logits of plain PEFT, one example at a time."""
    base = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=OUTPUTS[kind])
    model, words = PeftModel.from_pretrained(base, folder).eval(), AutoTokenizer.from_pretrained(root / "base")
    found = []
    for text in texts:
        tokens = words(*text, return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
        found.append(logits[0].tolist())
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_plain_peft(runs, root, kind):
    texts = texts_of(kind)
    words = [word for text in texts for pair in zip(("--text", "--text-pair"), text, strict=False) for word in pair]
    done = call("predict", runs[kind], *words, "--json")
    assert done.exit_code == 0, done.output
    shown, logits = json.loads(done.stdout), plain_logits(runs[kind], root, kind, texts)
    for row, text, values in zip(shown, texts, logits, strict=True):
        assert [row["text"], *([row["text_pair"]] if kind == "pairs" else [])] == text
        if kind == "number":
            assert row["value"] == pytest.approx(values[0], abs=1e-5) and "probability" not in row
        elif kind == "several":
            wanted = 1 / (1 + np.exp(-values))
            assert list(row["probabilities"]) == list(NAMES)
            assert list(row["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
            assert row["labels"] == [name for name, value in zip(NAMES, wanted, strict=True) if value > 0.5]
        else:
            assert row["label"] == str(values.argmax())
    lines = call("predict", runs[kind], *words).stdout.splitlines()
    assert len(lines) == 3
    assert ("%" in lines[0]) == (kind != "number") or "(none)" in lines[0]
    assert (" | " in lines[0]) == (kind == "pairs")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_files_rows_come_back_with_their_predictions(runs, root, tmp_path, kind, suffix):
    source, target = tmp_path / "in.jsonl", tmp_path / f"out.{suffix}"
    source.write_text("\n".join(json.dumps(row) for row in rows(kind)[:5]) + "\n")
    done = call("predict", runs[kind], "--file", source, "--output", target)
    assert done.exit_code == 0, done.output
    read = {"csv": pandas.read_csv, "jsonl": lambda path: pandas.read_json(path, lines=True),
            "parquet": pandas.read_parquet}[suffix]  # fmt: skip
    table = read(target)
    wanted = Predictor(runs[kind]).texts(*map(list, zip(*texts_of(kind, 5), strict=True)))
    column = {"pairs": "predicted_label", "several": "predicted_labels", "number": "value"}[kind]
    for found, row in zip(table[column], wanted, strict=True):
        if kind == "number":
            assert found == pytest.approx(row["value"], abs=1e-4)
        else:
            found = json.loads(found) if kind == "several" and suffix == "csv" else found
            assert (list(found) if kind == "several" else str(found)) == row["labels" if kind == "several" else "label"]


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("pairs", ["--text", "a"], "was trained on pairs (sentence1, sentence2)"),
        ("number", ["--text", "a", "--text-pair", "b"], "was trained on single texts"),
        ("pairs", ["--text", "a", "--text", "b", "--text-pair", "c"], "1 for 2 --text"),
        ("pairs", ["--file", "in.jsonl", "--column", "sentence1"], "--column: expected 2 columns, got 1"),
        ("pairs", ["--file", "in.jsonl", "--column", "sentence1", "--column", "sentense2"], "Did you mean 'sentence2'"),
    ],
)
def test_what_does_not_fit_the_adapter_is_an_error_without_a_traceback(
    runs, tmp_path, monkeypatch, kind, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(json.dumps(rows("pairs")[0]) + "\n")
    done = call("predict", runs[kind], *words)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_passes_its_checks_merges_and_reproduces(runs, tmp_path, kind):
    findings = {finding.name: finding.ok for finding in check_adapter(runs[kind])}
    assert set(findings.values()) == {True}, findings
    merged = merge_adapter(runs[kind], tmp_path / "merged")
    assert merged["before"][METRIC[kind]] == pytest.approx(merged["after"][METRIC[kind]], abs=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == OUTPUTS[kind]
    found = reproduce(runs[kind])
    assert found.held and {row.metric for row in found.rows} >= {METRIC[kind], "loss"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cards_code_runs_as_it_is(runs, root, monkeypatch, capsys, kind):
    code = code_in((runs[kind] / "README.md").read_text())
    monkeypatch.chdir(runs[kind])
    exec(compile(code.replace('"./base"', repr(str(root / "base"))), "card", "exec"), {})
    printed = capsys.readouterr().out.strip()
    if kind == "number":
        float(printed)
    else:
        assert printed.strip("[]'") in ("", "0", "1", *NAMES) or "," in printed


def test_an_adapter_from_elsewhere_with_one_output_predicts_a_number(root, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS", init_lora_weights=False,
                        modules_to_save=["pre_classifier", "classifier"])  # fmt: skip
    folder = saved(root / "base", tmp_path / "plain", config, labels=1)
    found = Predictor(folder).texts(["good warm", "cold sad"])
    assert [set(row) for row in found] == [{"value"}] * 2
    assert Predictor(folder).texts(["good warm"], ["cold sad"])[0]["value"] != found[0]["value"]  # a pair, too
    assert all(finding.ok is not False for finding in check_adapter(folder))
