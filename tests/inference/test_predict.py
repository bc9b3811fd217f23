"""predict: labels and probabilities of texts and images, in files and on the terminal."""

from __future__ import annotations

import json
import re

import datasets
import pandas as pd
import pytest
import torch
from peft import PeftModel
from PIL import Image
from saved_adapters import lora, saved
from small import sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from peft_recipes import Arm, Dataset, Pretraining, Recipe, train
from peft_recipes.cli.app import app
from peft_recipes.inference.predict import Predictor


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(classify, runs):
    """A classifier of good and bad sentences; trained once."""
    folder = runs / "tiny" / "lora" / "seed-0"
    if not folder.exists():
        train(classify(training={"num_train_epochs": 6, "per_device_train_batch_size": 16, "use_cpu": True}), "lora",
              output=runs)  # fmt: skip
    return folder


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


TEXTS = [text for text, _ in sentences(30, seed=9)]
TRUE = [label for _, label in sentences(30, seed=9)]


def test_labels_and_probabilities_are_those_of_plain_peft(run, tiny):
    shown = json.loads(call("predict", run, "--text", TEXTS[0], "--text", TEXTS[1], "--json").stdout)
    base = AutoModelForSequenceClassification.from_pretrained(tiny("distilbert"), num_labels=2)
    model, words = PeftModel.from_pretrained(base, run).eval(), AutoTokenizer.from_pretrained(tiny("distilbert"))
    for row, text in zip(shown, TEXTS, strict=False):
        with torch.no_grad():
            wanted = model(**words(text, return_tensors="pt")).logits[0].softmax(-1).tolist()
        assert row["text"] == text and list(row["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
        assert row["label"] == ["bad", "good"][wanted[1] > 0.5] and row["probability"] == pytest.approx(max(wanted))
    assert "good" in call("predict", run, "--text", TEXTS[1]).stdout


def test_a_batch_of_texts_gives_the_results_of_one_at_a_time(run):
    one_by_one = [Predictor(run, batch_size=1).texts([text])[0] for text in TEXTS[:4]]
    together = Predictor(run, batch_size=3).texts([*TEXTS[:4], "so"])
    for one, row in zip(one_by_one, together, strict=False):
        assert one["label"] == row["label"] and one["probability"] == pytest.approx(row["probability"], abs=1e-5)
    right = sum(row["label"] == label for row, label in zip(Predictor(run).texts(TEXTS), TRUE, strict=True))
    assert right >= 24  # the classifier is trained


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "txt"])
def test_predictions_from_file_to_file(run, tmp_path, suffix):
    source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{'csv' if suffix == 'txt' else suffix}"
    table = pd.DataFrame({"number": range(30), "body": TEXTS, "label": TRUE})
    if suffix == "csv":
        table.to_csv(source, index=False)
    elif suffix == "jsonl":
        table.to_json(source, orient="records", lines=True)
    elif suffix == "parquet":
        table.to_parquet(source)
    else:
        source.write_text("\n".join(TEXTS) + "\n\n")
    done = call(
        "predict", run, "--file", source, "--output", target, *(["--column", "body"] if suffix == "csv" else [])
    )
    assert done.exit_code == 0 and done.stdout == "" and "30 rows" in done.stderr, done.stderr
    made = {"csv": pd.read_csv, "parquet": pd.read_parquet, "jsonl": lambda p: pd.read_json(p, lines=True)}[
        target.suffix[1:]
    ](target)
    wanted = Predictor(run).texts(TEXTS)
    if suffix == "txt":
        assert list(made.columns) == ["text", "label", "probability"]
        assert list(made["label"]) == [row["label"] for row in wanted]
    else:
        assert list(made.columns) == ["number", "body", "label", "predicted_label", "probability"]
        assert list(made["label"]) == TRUE and list(made["body"]) == TEXTS
        assert list(made["predicted_label"]) == [row["label"] for row in wanted]
        assert list(made["probability"]) == pytest.approx([row["probability"] for row in wanted], abs=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# <r> stands for the result of a row: good or bad, and its probability.
UNTOUCHED = {
    "in.csv": (
        b'\xef\xbb\xbfid,body,n\r\n0012,"a ""good"" film, really\r\nso",NA\r\n\r\n5,,5.0\r\n007, bad ,None',
        b'\xef\xbb\xbfid,body,n,label,probability\r\n0012,"a ""good"" film, really\r\nso",NA,<r>\r\n\r\n5,,5.0,,\r\n'
        b"007, bad ,None,<r>",
    ),
    "semicolons.csv": (
        b"id;body\n01;good, really\n02;\n03;bad\n",
        b"id;body;label;probability\n01;good, really;<r>\n02;;;\n03;bad;<r>\n",
    ),
    "in.tsv": (
        b'id\tbody\n01\tgood "film\n02\t\n03\tbad\n',
        b'id\tbody\tlabel\tprobability\n01\tgood "film\t<r>\n02\t\t\t\n03\tbad\t<r>\n',
    ),
    "in.jsonl": (
        b'{"n": 1.0, "body": "good", "x": 1e5}\r\n\r\n{ "body": null }\n{"body": "bad"}',
        b'{"n": 1.0, "body": "good", "x": 1e5, <r>}\r\n\r\n{ "body": null, "label": null, "probability": null }\n'
        b'{"body": "bad", <r>}',
    ),
    "in.json": (
        b'[\n  {"n": 1.50, "body": "good"},\n  {"body": ""}, {"body": "bad"}\n]\n',
        b'[\n  {"n": 1.50, "body": "good", <r>},\n  {"body": "", "label": null, "probability": null}, '
        b'{"body": "bad", <r>}\n]\n',
    ),
}
_RESULT = re.compile(rb'"label": "(good|bad)", "probability": 0\.\d+|(?<=[,;\t])(good|bad)[,;\t]0\.\d+')


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_was_in_a_file_stays_byte_for_byte(run, tmp_path, name):
    given, wanted = UNTOUCHED[name]
    source, target = tmp_path / name, tmp_path / f"out{name[name.index('.') :]}"
    source.write_bytes(given)
    done = call("predict", run, "--file", source, "--output", target, "--column", "body")
    assert done.exit_code == 0 and "1 of 3 rows have no text, and so no result." in done.stderr, done.stderr
    assert _RESULT.sub(b"<r>", target.read_bytes()) == wanted
    again = call("predict", run, "--file", source, "--column", "body", "--json")
    assert [row["label"] is None for row in json.loads(again.stdout)] == [False, True, False]
    assert "(no text)" in call("predict", run, "--file", source, "--column", "body").stdout


def test_a_result_overwrites_no_column(run, tmp_path):
    (tmp_path / "in.csv").write_text("body,label,predicted_label\ngood,011,x\n")
    call("predict", run, "--file", tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    header, row = (tmp_path / "out.csv").read_text().splitlines()
    assert header == "body,label,predicted_label,predicted_label_2,probability" and row.startswith("good,011,x,")


def test_rows_in_another_format_keep_their_values(run, tmp_path):
    (tmp_path / "in.csv").write_text("id,body\n007,good\nNA,bad\n")
    call("predict", run, "--file", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl")
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").open()] == ["007", "NA"]
    (tmp_path / "in.jsonl").write_text('{"body": "good", "tags": ["ä", null]}\n{"body": "bad"}\n')
    call("predict", run, "--file", tmp_path / "in.jsonl", "--output", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith('good,"[""ä"", null]",')


def test_out_of_memory_halves_the_batch_and_no_example_is_run_twice(run):
    predictor, sizes = Predictor(run, batch_size=16), []
    inner = predictor.model.forward

    def forward(**given):
        rows = len(given["input_ids"])
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        sizes.append(rows)
        return inner(**given)

    predictor.model.forward = forward
    found = predictor.texts(TEXTS)
    assert predictor.batch_size == 4 and sizes == [4] * 7 + [2]
    assert [row["label"] for row in found] == [row["label"] for row in Predictor(run).texts(TEXTS)]


def test_an_adapter_of_plain_peft_has_the_class_names_of_its_base(tiny, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny("distilbert"), id2label={0: "ham", 1: "spam", 2: "eggs"}, label2id={"ham": 0, "spam": 1, "eggs": 2}
    )
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny("distilbert")).save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "base", tmp_path / "mine", lora(target_modules=["q_lin"], task_type="SEQ_CLS"), labels=3)
    assert Predictor(folder).texts(["good"])[0]["label"] in ("ham", "spam", "eggs")
    plain = saved(tiny("distilbert"), tmp_path / "plain", lora(target_modules=["q_lin"], task_type="SEQ_CLS"), labels=3)
    assert list(Predictor(plain).texts(["good"])[0]["probabilities"]) == ["0", "1", "2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A run on dark and bright squares, with a small CNN that is trained first, and a folder of such squares."""
    root = tmp_path_factory.mktemp("pictures")
    rows = [{"image": Image.new("L", (28, 28), 5 + i + 130 * (i % 2)), "label": i % 2} for i in range(96)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})
    (root / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(root / "data" / "train.parquet")
    from peft import LoraConfig

    recipe = Recipe(
        name="squares", task="image-classification", model="small-cnn",
        dataset=Dataset(str(root / "data"), pretrain=48, train=24, validation=12, test=12),
        training={"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True},
        pretraining=Pretraining(num_train_epochs=2, batch_size=8),
        arms={"lora": Arm(LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False), learning_rate=1e-3)},
    )  # fmt: skip
    folder = train(recipe, "lora", output=root / "runs").folder
    (root / "asked").mkdir()
    for number, grey in enumerate([25, 210, 40, 215]):
        Image.new("RGB", (56, 56), (grey, grey, grey)).save(root / "asked" / f"{number}.png")
    return folder, root / "asked"


def test_images_by_file_and_by_folder(pictures, tmp_path):
    folder, asked = pictures
    done = call("predict", folder, "--image", asked, "--output", tmp_path / "out.csv", "--json")
    found = json.loads(done.stdout)
    assert [row["label"] for row in found] == ["dark", "bright", "dark", "bright"]
    assert list(pd.read_csv(tmp_path / "out.csv")["label"]) == ["dark", "bright", "dark", "bright"]
    one = json.loads(call("predict", folder, "--image", asked / "1.png", "--json").stdout)
    assert one[0]["image"].endswith("1.png") and one[0]["probability"] == pytest.approx(found[1]["probability"])


def test_user_mistakes(run, pictures, tiny, tmp_path):
    table = tmp_path / "in.csv"
    table.write_text("number,body\n1,good film\n2,\n")
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "numbers.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "blank.csv").write_text("text,label\n,a\n")
    (tmp_path / "two.csv").write_text("first,second\na,b\n")
    writes = saved(tiny("llama"), tmp_path / "writes")
    folder, asked = pictures
    for words, message in (
        ([tmp_path, "--text", "x"], "There are adapters in"),
        ([tmp_path / "none", "--text", "x"], "no folder"),
        ([run], "nothing was given to ask"),
        ([run, "--text", "x", "--file", table], "--text and --file contradict each other"),
        ([run, "--file", tmp_path / "none.csv"], "is not there"),
        ([run, "--file", tmp_path / "none.txt"], "none.txt is not there"),
        ([run, "--file", tmp_path / "in.xlsx"], "save the sheet as csv"),
        ([run, "--file", tmp_path / "empty.txt"], "is empty"),
        ([run, "--file", table, "--column", "bodi"], "Did you mean 'body'"),
        ([run, "--file", tmp_path / "two.csv"], "Name it: --column NAME. It has: first, second"),
        ([run, "--file", tmp_path / "numbers.jsonl", "--column", "text"], "row 1, column 'text': expected text, got 5"),
        ([run, "--file", tmp_path / "blank.csv"], "no row has a text in its column 'text'"),
        ([run, "--file", "https://example.org/x.csv"], "is an address, and files are not downloaded"),
        ([run, "--file", table, "--output", tmp_path / "x.xlsx"], "expected .csv"),
        ([run, "--file", table, "--output", tmp_path / "no" / "x.csv"], "there is no folder"),
        ([run, "--text", "x", "--batch-size", "0"], "1 or more"),
        ([run, "--image", asked], "classifies texts, not images"),
        ([folder, "--text", "x"], "classifies images, not texts"),
        ([folder, "--image", tmp_path / "none.png"], "There is no image"),
        ([folder, "--image", tmp_path / "broken.png"], "can't be read as an image"),
        ([writes, "--text", "x"], "use `generate`"),
        ([run, "--text", "x", "--base", tiny("gpt2")], "does not fit its base"),
    ):
        done = call("predict", *words)
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), (words, done.stderr)
        assert "Traceback" not in done.output and done.stdout == ""
