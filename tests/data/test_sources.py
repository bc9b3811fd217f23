"""Splits are reproducible, and mistakes in a dataset are reported with their file, row and column."""

from __future__ import annotations

import json

import datasets
import pytest
from rows import sft_rows
from small import sentences

from peft_recipes import Dataset, RecipeError
from peft_recipes.data import formats
from peft_recipes.data.sources import load_splits


def csv_of(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def hundred(tmp_path):
    return csv_of(tmp_path / "d.csv", [f"{text},{label}" for text, label in sentences(100)])


def test_one_split_is_cut_into_three_without_overlap(hundred):
    splits = load_splits(Dataset(str(hundred), train=0.7, validation=0.1, test=0.2))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 70, "validation": 10, "test": 20}
    assert len({i for rows in splits.values() for i in rows["id"]}) == 100


def test_shares_that_add_up_to_one_lose_no_row(tmp_path):
    path = csv_of(tmp_path / "d.csv", [f"{text},{label}" for text, label in sentences(97)])
    splits = load_splits(Dataset(str(path), train=0.7, validation=0.1, test=0.2))
    assert sum(len(rows) for rows in splits.values()) == 97


def test_the_cut_depends_on_the_datasets_seed_alone(hundred):
    first, again = (load_splits(Dataset(str(hundred), seed=1))["test"]["id"] for _ in range(2))
    other = load_splits(Dataset(str(hundred), seed=2))["test"]["id"]
    assert list(first) == list(again) != list(other)


def test_pretraining_rows_are_in_no_other_split(hundred):
    splits = load_splits(Dataset(str(hundred), pretrain=30, train=40, validation=10, test=20))
    assert [len(splits[s]) for s in ("pretrain", "train", "validation", "test")] == [30, 40, 10, 20]
    assert len({i for rows in splits.values() for i in rows["id"]}) == 100


def test_balance_takes_as_many_of_each_class_and_mixes_them(tmp_path):
    common = [(f"good film number {i}", "good") for i in range(900)]
    rare = [(f"bad film number {i}", "bad") for i in range(100)]
    path = csv_of(tmp_path / "d.csv", [f"{text},{label}" for text, label in common + rare])
    splits = load_splits(Dataset(str(path), balance=True, train=0.5, validation=0.25, test=0.25))
    counts = {name: list(rows["label"]) for name, rows in splits.items()}
    assert sum(labels.count("good") for labels in counts.values()) == 100
    assert sum(labels.count("bad") for labels in counts.values()) == 100
    # Each split has between a third and two thirds of the rare class.
    assert all(1 / 3 < labels.count("bad") / len(labels) < 2 / 3 for labels in counts.values())


def test_a_folder_of_files_has_their_splits(tmp_path):
    for split, seed in (("train", 0), ("test", 9)):
        csv_of(tmp_path / f"{split}.csv", [f"{text},{label}" for text, label in sentences(30, seed)])
    splits = load_splits(Dataset(str(tmp_path), train=None, validation=0.2, test=None, test_split="test"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 24, "validation": 6, "test": 30}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_local_formats_hold_the_same_rows(tmp_path, suffix):
    rows = [{"text": text, "label": label} for text, label in sentences(20)]
    path, table = tmp_path / f"d.{suffix}", datasets.Dataset.from_list(rows)
    if suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        table.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    splits = load_splits(Dataset(str(path), train=0.6, validation=0.2, test=0.2))
    found = {(row["text"], row["label"]) for part in splits.values() for row in part}
    assert found == {(row["text"], row["label"]) for row in rows}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.csv", "", "is empty"),
        ("d.csv", "text,label\n", "is empty: it has a header and no rows"),
        ("d.csv", "text,label\na,1\nb,2,3\nc,1\n", "line 3: 3 values where the header has 2 (text, label)"),
        ("d.csv", 'text,label\na,1\n"b,2\nc,1\n', "line"),
        ("d.csv", b"text,label\n\xff\xfe,1\n", "not UTF-8"),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2: not valid JSON"),
        ("d.jsonl", '{"text": "a"}\n[1]\n', "line 2: expected a JSON object"),
        ("d.parquet", b"PAR1 not really", "can't be read"),
    ],
)
def test_a_broken_file_names_the_file_and_the_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as raised:
        load_splits(Dataset(str(path)))
    assert message in str(raised.value)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"train": 500}, "asks for 500"),
        ({"path": "./nowhere.csv"}, "is not there"),
        ({"path": "./nowhere"}, "is not there"),
        ({"path": "embedded:mnits"}, "Did you mean 'mnist'"),
    ],
)
def test_missing_data_says_what_to_do(hundred, source, message):
    with pytest.raises(RecipeError) as raised:
        load_splits(Dataset(**{"path": str(hundred), **source}))
    assert message in str(raised.value)


def test_a_missing_split_names_the_nearest(tmp_path):
    for split in ("train", "test"):
        csv_of(tmp_path / f"{split}.csv", ["a,1", "b,2"])
    with pytest.raises(RecipeError, match="Did you mean 'test'"):
        load_splits(Dataset(str(tmp_path), test_split="tset"))


def rows_of(**values):
    table = datasets.Dataset.from_dict(values)
    return table.add_column("id", [f"train-{i}" for i in range(len(table))])


def test_a_missing_column_names_the_existing_ones():
    with pytest.raises(RecipeError, match=r"no column 'label'.*It has: text, lable"):
        formats.class_labels({"train": rows_of(text=["a"], lable=[1])}, Dataset("d.csv"))


@pytest.mark.parametrize("bad", [[1.5, 2.0], [True, False], [["a"], ["b"]], [None, "a"]])
def test_a_label_of_another_type_is_named_with_its_row(bad):
    with pytest.raises(RecipeError, match=r"row train-\d, column 'label': a label is a whole number or text"):
        formats.class_labels({"train": rows_of(text=["a", "b"], label=bad)}, Dataset("d.csv"))


def test_labels_outside_those_declared_are_named():
    source = Dataset("d.csv", labels=["ham", "spam"])
    with pytest.raises(RecipeError, match=r"label 'eggs' is not one of dataset\.labels"):
        formats.class_labels({"train": rows_of(text=["a", "b"], label=["ham", "eggs"])}, source)


def test_a_value_that_is_not_text_is_named_with_its_row():
    with pytest.raises(RecipeError, match="row train-1, column 'text': expected text, got None"):
        formats.classification_rows(rows_of(text=["a", None], label=[0, 1]), Dataset("d.csv"), "text", ["no", "yes"])


def test_train_rows_of_later_splits_are_removed():
    splits = {
        "train": rows_of(text=["a", "b", "c", "d"]),
        "validation": rows_of(text=["b"]),
        "test": rows_of(text=["c"]),
    }
    kept, notes = formats.without_test_examples(splits, ["text"])
    assert list(kept["train"]["text"]) == ["a", "d"]
    assert notes == ["2 examples that also occur in a later split were left out."]


def test_a_further_set_loses_what_is_trained_on_and_may_share_the_test_rows():
    splits = {"train": rows_of(text=["a", "b", "c"]), "test": rows_of(text=["c", "d"]),
              "again": rows_of(text=["b", "c", "d"]), "plain": rows_of(body=["x"])}  # fmt: skip
    kept, notes = formats.without_test_examples(splits, ["text"])
    assert [list(kept[name]["text"]) for name in ("train", "again")] == [["a", "b"], ["c", "d"]]
    assert notes[1:] == ["1 examples of evaluate_also.again are also trained on and were left out of it."]
    with pytest.raises(RecipeError, match="Every example of 'again' is also in another split"):
        formats.without_test_examples({**splits, "again": rows_of(text=["a", "b"])}, ["text"])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "F"])
def test_images_are_compared_by_their_pixels(mode, tmp_path):
    from datasets import Dataset as Rows
    from PIL import Image as images

    def image(shade: int, size: tuple[int, int] = (4, 2)):
        return images.new("L", size, shade).convert(mode) if mode != "I;16" else images.new(mode, size, shade)

    def rows(*pictures):
        return Rows.from_dict({"id": [str(i) for i in range(len(pictures))], "image": list(pictures)})

    splits = {"train": rows(image(255), image(0), image(0, (2, 4))), "test": rows(image(0))}
    kept, notes = formats.without_test_examples(splits, ["image"])
    assert list(kept["train"]["id"]) == ["0", "2"] and notes[0].startswith("1 examples")


def test_the_fingerprint_follows_the_examples_and_nothing_else(hundred, tmp_path):
    copy = tmp_path / "elsewhere.csv"
    copy.write_text(hundred.read_text())
    here, there = (formats.fingerprint(load_splits(Dataset(str(path)))) for path in (hundred, copy))
    copy.write_text(hundred.read_text().replace("film", "flim"))
    assert here == there != formats.fingerprint(load_splits(Dataset(str(copy))))


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"instruction": "do", "input": "", "output": "done"}, [{"role": "user", "content": "do"}], "done"),
        ({"instruction": "do", "input": "x", "output": "y"}, [{"role": "user", "content": "do\n\nx"}], "y"),
        ({"prompt": "do", "completion": "done"}, [{"role": "user", "content": "do"}], "done"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [{"role": "user", "content": "a"}],
            "b",
        ),
    ],
)
def test_every_sft_format_becomes_prompt_and_completion(row, prompt, answer):
    rows = datasets.Dataset.from_list([{**row, "id": "train-0"}])
    made, empty = sft_rows(rows, Dataset("d"), chat=True)
    assert made[0] == {"id": "train-0", "prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
    assert not empty


def test_rows_without_an_answer_are_left_out_and_counted():
    rows = rows_of(instruction=["a", "b"], input=["", ""], output=["x", "  "])
    made, empty = sft_rows(rows, Dataset("d"), chat=False)
    assert (len(made), empty, made[0]["completion"]) == (1, {"an empty answer": 1}, "x")


def test_a_dataset_without_any_answer_is_refused():
    with pytest.raises(
        RecipeError, match=r"1 of 1 rows of 'train' can't be used: row .*0 has an empty answer. No row is left"
    ):
        sft_rows(rows_of(instruction=["a"], input=[""], output=[None]), Dataset("d"), chat=True)


def test_columns_of_no_sft_format_list_the_formats():
    with pytest.raises(
        RecipeError, match=r"columns ask, reply.*prompt, completion; instruction, output.*dataset.columns"
    ):
        sft_rows(rows_of(ask=["a"], reply=["b"]), Dataset("d"), chat=True)
