"""Files are read as they are written: every suffix and compression, byte order marks, patterns; csv cells are text."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma

import datasets
import pytest

from peft_recipes import Dataset, RecipeError
from peft_recipes.data.sources import load_splits

BOM = b"\xef\xbb\xbf"
SIZES = {"train": 6, "validation": 2, "test": 2}
ROWS = [{"text": f"film {i}", "label": f"l{i % 2}"} for i in range(10)]


def csv_text(rows, mark=",", end="\n"):
    return end.join([mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]) + end


def jsonl_text(rows, end="\n"):
    return end.join(map(json.dumps, rows)) + end


def rows_of(path, notes=None, **options):
    splits = load_splits(Dataset(str(path), **{**SIZES, **options}), notes)
    return sorted((row for part in splits.values() for row in part), key=lambda row: int(row["id"].split("-")[1]))


def without_id(rows):
    return [{key: value for key, value in row.items() if key != "id"} for row in rows]


WRITTEN = {
    "d.CSV": BOM + csv_text(ROWS, end="\r\n").encode(),
    "d.csv": csv_text(ROWS, mark=";").encode(),
    "d.tsv": BOM + csv_text(ROWS, mark="\t").encode(),
    "d.ndjson": jsonl_text(ROWS, end="\r\n").encode(),
    "d.JSONL": BOM + jsonl_text(ROWS).encode(),
    "d.json": BOM + json.dumps(ROWS, indent=1).encode(),
    "d.csv.gz": gzip.compress(BOM + csv_text(ROWS).encode()),
    "d.jsonl.gz": gzip.compress(jsonl_text(ROWS).encode()),
    "d.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "d.tsv.xz": lzma.compress(csv_text(ROWS, mark="\t").encode()),
    "d[1].jsonl": jsonl_text(ROWS).encode(),
}


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_any_suffix_holds_its_rows(name, folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(WRITTEN[name])
    read = rows_of(tmp_path / "data" if folder else tmp_path / "data" / name)
    assert without_id(read) == ROWS


def test_a_line_of_a_text_file_is_an_example(tmp_path):
    (tmp_path / "d.txt").write_bytes(BOM + "\r\n\r\n".join(f"line {i}" for i in range(10)).encode())
    notes = []
    assert [row["text"] for row in rows_of(tmp_path / "d.txt", notes)] == [f"line {i}" for i in range(10)]
    assert notes == ["Each line of a .txt file is an example; empty lines are left out."]


def test_zstandard_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "d.jsonl.zst").write_bytes(b"x")
    with pytest.raises(RecipeError, match="pip install zstandard"):
        rows_of(tmp_path / "d.jsonl.zst")


CELLS = ["None", "NA", "N/A", "nan", "True", "011", "1.0", " x ", "null", "#N/A"]


def test_cells_of_a_csv_file_are_text(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"{cell},{cell}\n" for cell in CELLS))
    assert without_id(rows_of(tmp_path / "d.csv")) == [{"text": cell, "label": cell} for cell in CELLS]


def test_an_empty_cell_is_empty_text(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"{'x' * (i % 2)},a\n" for i in range(10)))
    assert [row["text"] for row in rows_of(tmp_path / "d.csv")] == ["", "x"] * 5


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["0", "1"], [0, 1]),
        (["10", "2"], [10, 2]),
        (["0.0", "1.0"], [0, 1]),
        (["-1", "1"], [-1, 1]),
        (["0", ""], [0, None]),
        (["0.5", "2"], [0.5, 2.0]),
        (["1e-3", "2"], [0.001, 2.0]),
        (["011", "012"], ["011", "012"]),
        (["0", "NA"], ["0", "NA"]),
        (["True", "False"], ["True", "False"]),
        (["nan", "x"], ["nan", "x"]),
    ],
)
def test_a_label_column_of_numbers_holds_numbers(cells, read, tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"w {i},{cells[i % 2]}\n" for i in range(10)))
    assert [row["label"] for row in rows_of(tmp_path / "d.csv")] == read * 5


def test_lists_in_the_label_column_are_several_classes(tmp_path):
    cells = ['"[""a"", ""b""]"', "\"['b']\"", "[]"]
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"w {i},{cells[i % 3]}\n" for i in range(12)))
    assert {tuple(row["label"]) for row in rows_of(tmp_path / "d.csv")} == {("a", "b"), ("b",), ()}
    one = rows_of(tmp_path / "d.csv", problem_type="single_label_classification")
    assert {row["label"] for row in one} == {'["a", "b"]', "['b']", "[]"}


def test_labels_that_the_recipe_names_stay_text(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"w {i},{i % 2}\n" for i in range(10)))
    assert [row["label"] for row in rows_of(tmp_path / "d.csv", labels=["0", "1"])][:2] == ["0", "1"]
    assert [row["label"] for row in rows_of(tmp_path / "d.csv", labels=["no", "yes"])][:2] == [0, 1]


def test_labels_of_other_formats_keep_their_type(tmp_path):
    (tmp_path / "d.jsonl").write_text(jsonl_text([{"text": f"w {i}", "label": f"0.{i % 2}"} for i in range(10)]))
    assert rows_of(tmp_path / "d.jsonl")[1]["label"] == "0.1"


def test_numbers_among_which_one_is_none_are_refused(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"w {i},{i}.5\n" for i in range(9)) + "w,NA\n")
    with pytest.raises(RecipeError, match="column 'label': its cells are numbers, and one is 'NA'"):
        rows_of(tmp_path / "d.csv")
    assert rows_of(tmp_path / "d.csv", problem_type="single_label_classification")[9]["label"] == "NA"


def test_a_text_that_looks_like_a_date_stays_text(tmp_path):
    rows = [{"text": f"2024-05-{i + 10}", "turns": [{"said": "2024-05-01"}]} for i in range(10)]
    (tmp_path / "d.jsonl").write_text(jsonl_text(rows))
    read = rows_of(tmp_path / "d.jsonl")
    assert without_id(read) == rows and not isinstance(read[0]["text"], datetime.datetime)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"text,label,text\na,b,c\n", "the column 'text' is named twice in its header (columns 1 and 3)"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', "line 2: an object has the key 'text' twice"),
        ("d.jsonl", b'{"text": NaN}\n', "line 1: NaN is no JSON"),
        ("d.jsonl", b"\n\n", "is empty: it has no rows"),
        ("d.json", b"[]", "is empty: it has no rows"),
        ("d.json", b'{"data": [1]}', "holds one object (data); expected a list of objects"),
        ("d.json", b'[{"a": 1}, 2]', "row 2: expected a JSON object, got int"),
        ("d.json", b"[1", "line 1: not valid JSON"),
        ("d.csv", "text,label\na,b\n".encode("utf-16"), "is UTF-16 text. Save it as UTF-8"),
        ("d.csv", "text,label\nä,b\n".encode("cp1252"), "iconv -f CP1252"),
        ("d.jsonl.gz", b'{"text": "a"}\n', "can't be decompressed"),
        ("d.jsonl.gz", gzip.compress(jsonl_text(ROWS).encode())[:-20], "can't be decompressed"),
        ("d.csv.xz", b"no xz", "can't be decompressed"),
        ("d.xlsx", b"PK", "save the sheet as csv"),
        ("d.zip", b"PK", "unpack it"),
        ("d.pkl", b"x", "a pickle can run code"),
        ("d.txt", b"\n \n", "is empty"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,  # a gz holds the time
)  # fmt: skip
def test_what_is_not_read_says_why(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        rows_of(tmp_path / name)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://example.org/data/x.csv?raw=1", "'https://example.org/data/x.csv?raw=1' is an address, and files are"),
        ("https://huggingface.co/datasets/org/name", "Give the Hub's name of the dataset: org/name"),
        ("hf://datasets/org/name@main/x.csv", "Give the Hub's name of the dataset: org/name"),
        ("s3://bucket/x.csv", "Download it, and name the file: x.csv"),
        ("file:///data/x.csv", "Give the path itself: /data/x.csv"),
    ],
)
def test_an_address_is_refused_by_name(path, message):
    assert message in "\n".join(Dataset(path).problems())


def test_a_pattern_names_files_and_their_splits(tmp_path):
    for name in ("train-a", "train-b", "test"):
        (tmp_path / f"{name}.jsonl").write_text(jsonl_text(ROWS))
    (tmp_path / "other.csv").write_text(csv_text(ROWS))
    notes = []
    splits = load_splits(Dataset(str(tmp_path / "*.jsonl"), validation=4, test=None), notes)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 16, "validation": 4, "test": 10}
    assert "3 files (train: train-a.jsonl, train-b.jsonl; test: test.jsonl)" in notes[0]
    with pytest.raises(RecipeError, match="no file has such a name"):
        load_splits(Dataset(str(tmp_path / "*.parquet")))


def test_a_folder_may_hold_files_of_several_formats(tmp_path):
    (tmp_path / "train.csv").write_text(csv_text(ROWS))
    (tmp_path / "test.jsonl").write_text(jsonl_text(ROWS))
    (tmp_path / "notes.docx").write_text("x")
    notes = []
    splits = load_splits(Dataset(str(tmp_path), validation=2), notes)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "validation": 2, "test": 10}
    assert notes[0] == f"Files of '{tmp_path}' that are not read: notes.docx."


def test_files_whose_columns_differ_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text(csv_text(ROWS))
    (tmp_path / "b.csv").write_text("text,stars\na,1\n")
    with pytest.raises(RecipeError, match=r"different columns \(a.csv: text, label; b.csv: text, stars\)"):
        load_splits(Dataset(str(tmp_path)))


def test_a_folder_of_save_to_disk(tmp_path):
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    ).save_to_disk(tmp_path / "saved")
    splits = load_splits(Dataset(str(tmp_path / "saved"), validation=2))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "validation": 2, "test": 10}


def folder_of(folder, **splits):
    for name, label in splits.items():
        rows = [{"text": f"{name} film {i}", "label": label(i)} for i in range(20)]
        (folder / f"{name}.jsonl").write_text(jsonl_text(rows))
    return str(folder)


def label(i):
    return i % 2


@pytest.mark.parametrize("name", ["test", "eval"])
def test_a_folders_own_test_split_is_used(name, tmp_path):
    notes = []
    splits = load_splits(Dataset(folder_of(tmp_path, train=label, **{name: label})), notes)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 18, "validation": 2, "test": 20}
    assert all(text.startswith(name) for text in splits["test"]["text"])
    assert notes == [
        "The test split is the dataset's own split 'test' (all 20 examples). --set dataset.test_split=train cuts it "
        "from 'train' instead."
    ]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_folders_own_validation_split_is_used(name, tmp_path):
    splits = load_splits(Dataset(folder_of(tmp_path, train=label, **{name: label})))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 16, "validation": 20, "test": 4}
    assert all(text.startswith(name) for text in splits["validation"]["text"])


def test_a_number_limits_an_own_split_and_a_share_does_not(tmp_path):
    path = folder_of(tmp_path, train=label, dev=label, test=label)
    sizes = [
        {split: len(rows) for split, rows in load_splits(Dataset(path, **given)).items()}
        for given in ({"test": 5, "validation": 0.2}, {"test": 500})
    ]
    assert [size["test"] for size in sizes] == [5, 20] and sizes[0]["validation"] == 20 and sizes[0]["train"] == 20


def test_shares_that_add_up_to_one_leave_no_row_of_train_out(tmp_path):
    sizes = {"train": 0.6, "validation": 0.2, "test": 0.2}
    path = folder_of(tmp_path, train=label, test=label)
    assert {name: len(rows) for name, rows in load_splits(Dataset(path, **sizes)).items()} == {
        "train": 15, "validation": 5, "test": 20,
    }  # fmt: skip
    path = folder_of(tmp_path, train=label, test=label, dev=label)
    assert len(load_splits(Dataset(path, **sizes))["train"]) == 20


def test_the_recipe_overrules_own_splits(tmp_path):
    path, notes = folder_of(tmp_path, train=label, dev=label, test=label), []
    splits = load_splits(Dataset(path, test_split="train", validation_split="train"), notes)
    assert notes == [] and all(text.startswith("train") for text in splits["test"]["text"])
    splits = load_splits(Dataset(path, test_split="validation", test=None), notes)
    assert all(text.startswith("dev") for text in splits["test"]["text"]) and len(splits["validation"]) == 2


def test_an_own_split_without_labels_is_not_used(tmp_path):
    notes = []
    splits = load_splits(Dataset(folder_of(tmp_path, train=label, test=lambda i: -1)), notes)
    assert len(splits["test"]) == 4 and "The dataset's split 'test' has no labels and is not used" in notes[0]
