"""predict of a token classifier: the entities of transformers' own pipeline, in texts, files and long texts."""

from __future__ import annotations

import contextlib
import io
import json

import pandas
import pytest
from card_code import code_in
from peft import PeftModel
from tagged import TAGS, base_with, bytelevel, tag_recipe, tagged, wordpiece, written
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from peft_recipes import train
from peft_recipes.cli.app import app
from peft_recipes.inference.predict import Predictor

TEXTS = ["We saw splendid bright films, so awful.", "it was a sad day", "nothing", " ", "Glad, splendid  warm film"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return written(tmp_path_factory.mktemp("tagged") / "sentences.jsonl", tagged(160))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_with(wordpiece(), "distilbert", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """A tagger of good and bad words; trained once."""
    return train(tag_recipe(base, data), "lora", output=tmp_path_factory.mktemp("runs")).folder


def plain_pipeline(base, run):
    """transformers' pipeline on the adapter, loaded by plain PEFT."""
    model = AutoModelForTokenClassification.from_pretrained(base, id2label=dict(enumerate(TAGS)))
    model = PeftModel.from_pretrained(model, run).eval()
    return pipeline(
        "token-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(base),
        aggregation_strategy="first",
    )  # fmt: skip


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_entities_are_those_of_transformers_pipeline(base, run):
    found = Predictor(run, batch_size=2).texts(TEXTS)
    for text, row, wanted in zip(TEXTS, found, plain_pipeline(base, run)(TEXTS), strict=True):
        own = [(e["label"], e["start"], e["end"]) for e in row["entities"]]
        assert own == [(e["entity_group"], e["start"], e["end"]) for e in wanted]
        assert [e["score"] for e in row["entities"]] == pytest.approx([float(e["score"]) for e in wanted], abs=1e-5)
        assert all(e["text"] == text[e["start"] : e["end"]] for e in row["entities"])
    assert found[0]["entities"] and found[3]["entities"] == []


def test_a_text_longer_than_max_length_is_read_to_its_end(run):
    text = " ".join(["it was so"] * 20 + ["splendid bright"])
    found = Predictor(run).texts([text])[0]["entities"]
    assert found[-1]["end"] == len(text) and found[-1]["label"] == "GOOD"


def test_entities_on_the_terminal_and_as_json(run):
    shown = call("predict", run, "--text", TEXTS[0], "--text", TEXTS[3])
    assert "GOOD" in shown.stdout and "splendid bright" in shown.stdout and "(nothing)" in shown.stdout
    rows = json.loads(call("predict", run, "--text", TEXTS[0], "--json").stdout)
    assert rows[0]["text"] == TEXTS[0] and set(rows[0]["entities"][0]) == {"text", "label", "start", "end", "score"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_entities_of_a_file(run, tmp_path, suffix):
    source, target = tmp_path / "in.txt", tmp_path / f"out.{suffix}"
    source.write_text("\n".join([TEXTS[0], TEXTS[1]]) + "\n")
    assert call("predict", run, "--file", source, "--output", target).exit_code == 0
    if suffix == "jsonl":
        entities = [json.loads(line)["entities"] for line in target.read_text().splitlines()]
    elif suffix == "parquet":
        entities = [list(found) for found in pandas.read_parquet(target)["entities"]]
    else:
        entities = [json.loads(found) for found in pandas.read_csv(target)["entities"]]
    assert [[e["label"] for e in found] for found in entities] == [
        [e["label"] for e in row["entities"]] for row in Predictor(run).texts(TEXTS[:2])
    ]


def test_a_byte_level_tagger_finds_words_with_their_spaces(data, tmp_path):
    base = base_with(bytelevel(), "gpt2", tmp_path / "base")
    folder = train(tag_recipe(base, data, "gpt2"), "lora", output=tmp_path).folder
    text = "we saw a lovely film"
    found = Predictor(folder).texts([text])[0]["entities"]
    assert all(e["text"] == text[e["start"] : e["end"]] == e["text"].strip() for e in found)


def test_the_code_of_the_card_finds_the_same_entities(base, run, monkeypatch):
    code = code_in((run / "README.md").read_text()).replace(f'"./{base.name}"', f'"{base}"')
    assert 'pipeline("token-classification"' in code
    monkeypatch.chdir(run)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("A text whose entities to find.", TEXTS[0]), {})
    for entity in Predictor(run).texts([TEXTS[0]])[0]["entities"]:
        assert f"'start': {entity['start']}, 'end': {entity['end']}" in printed.getvalue()
    card = (run / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card and "- type: f1" in card
