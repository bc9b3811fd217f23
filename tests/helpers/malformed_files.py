"""Malformed files and folders: formats and encodings that are not read, cells, labels, splits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from malformed import _VALID_LINES, Case, _data, _parquet

_TEXTS = [f"film {i}" for i in range(40)]


def _csv(labels: list[str], texts: list[str] | None = None, header: str = "text,label") -> str:
    given = texts or _TEXTS
    return header + "\n" + "".join(f"{text},{labels[i % len(labels)]}\n" for i, text in enumerate(given))


def _jsonl(labels: list[object]) -> str:
    return "".join(json.dumps({"text": text, "label": labels[i % len(labels)]}) + "\n" for i, text in enumerate(_TEXTS))


def _folder(name: str, message: str, contents: dict[str, str], *changes: str, path: str = "") -> Case:
    def make(folder: Path, valid: dict[str, Path]) -> list[str]:
        (folder / "data").mkdir()
        for file, content in contents.items():
            (folder / "data" / file).write_text(content)
        given = folder / "data" / path if path else folder / "data"
        words = [word for change in (f"dataset.path={given}", *changes) for word in ("--set", change)]
        return ["compare", str(valid["classify"]), *words]

    return Case("dataset", name, make, message)


DATASETS = [
    _data("d.csv", _csv(["a", "b"], header="text,text"), "named twice in its header"),
    _data("d.tsv", "text\tlabel\tlabel\n" + "a\tb\tc\n" * 9, "named twice in its header"),
    _data("d.csv", "\n\n", "is empty", name="a csv of empty lines"),
    _data("d.csv", '"', "a quote that is opened here is never closed", name="a csv of a quote"),
    _data("d.csv", _csv(["a", "b"]).encode("utf-16"), "is UTF-16 text"),
    _data("d.csv", _csv(["ä", "b"]).encode("cp1252"), "iconv -f CP1252"),
    _data("d.csv", "text;label\n" + "a;b\n" * 3 + "a;b;c\n", "needs quotes", name="a semicolon too many"),
    _data("d.csv", _csv([f"{i}.5" for i in range(39)] + ["NA"]), "its cells are numbers, and one is 'NA'"),
    _data("d.csv", _csv(["a", "b", ""]), "a label is a whole number or text, got ''"),
    _data("d.csv", _csv(["a", "b"], ["" if i % 3 else f"film {i}" for i in range(40)]), "can't be used"),
    _data("d.csv", _csv(["-1"]), "is -1, so it has no labels"),
    _data("d.csv", _csv(["0", "20000"]), "labels run from 0 to 20000"),
    _data(
        "d.csv",
        _csv(["[a]", "[b]"]),
        "a label is a list",
        "dataset.problem_type=multi_label_classification",
        "metric=micro_f1",
        name="lists in a csv",
    ),
    _data("d.csv", _csv(["x", "y"]), "a label is a finite number", "dataset.problem_type=regression", "metric=mse"),
    _data(
        "d.csv",
        _csv(["0.5", "nan"]),
        "a label is a finite number",
        "dataset.problem_type=regression",
        "metric=mse",
        name="a label of NaN",
    ),
    _data("d.csv", _csv(["a", "b"], ["same"] * 40), "nothing is left", name="every row the same"),
    _data("d.csv", _csv(["a", "b"]), "too few for a test split", "dataset.test=0.001", name="a tiny share"),
    _data("d.csv", _csv(["a", "b"]), "needs at least two", "dataset.test=1", name="a test split of one"),
    _data("d.csv", _csv(["a", "b"]), "dataset.test", "dataset.test=0", name="a test split of none"),
    _data("d.csv", _csv(["a", "b"]), "dataset.test", "dataset.test=1.5", name="a test split of one and a half"),
    _data(
        "d.csv", _csv(["a", "b"]), "has no column 'txt'", "dataset.text=[text,txt]", name="a pair without its second"
    ),
    _data(
        "d.csv",
        _csv(["a", "b"]),
        "one class per example",
        "dataset.balance=true",
        "dataset.problem_type=regression",
        "metric=mse",
        name="balanced numbers",
    ),
    _data(
        "d.csv", _csv(["a", "b"]), "expected a column, or the two columns", "dataset.text=[text]", name="half a pair"
    ),
    _data("d.jsonl", '{"text": "a", "label": "b", "label": "c"}\n', "has the key 'label' twice"),
    _data("d.jsonl", '{"text": "a", "label": NaN}\n', "NaN is no JSON"),
    _data("d.jsonl", "\n\n", "has no rows", name="a jsonl of empty lines"),
    _data("d.jsonl", '"text"\n', "expected a JSON object", name="a line that is text"),
    _data("d.jsonl", "[" * 100_000 + "\n", "nested too deeply"),
    _data("d.jsonl", _VALID_LINES.replace("}", "},", 1), "line 1", name="a comma behind a line"),
    _data("d.jsonl", _VALID_LINES.replace('"', "'"), "line 1", name="single quotes"),
    _data("d.jsonl", _jsonl([["a", "a"], ["b"]]), "names a class twice", "metric=micro_f1"),
    _data("d.jsonl", _jsonl([["a", 1], ["b"]]), "are mixed", "metric=micro_f1", name="lists of text and numbers"),
    _data("d.jsonl", _jsonl([{"a": 1}]), "a label is a whole number or text", name="a label that is an object"),
    _data("d.jsonl", _VALID_LINES, "is not one of dataset.labels", "dataset.labels=[x,y]", name="other class names"),
    _data("d.json", "[]", "has no rows"),
    _data("d.json", " ", "has no rows", name="a json of a space"),
    _data("d.json", '{"data": [{"text": "a"}]}', "holds one object (data)"),
    _data("d.json", '{"text": {"0": "a"}, "label": {"0": "b"}}', "holds one object (text, label)"),
    _data("d.json", '[{"text": "a", "label": "b"}, 3]', "row 2: expected a JSON object"),
    _data("d.json", '"text"', "expected a list of objects, got str"),
    _data("d.jsonl.gz", "no gzip", "can't be decompressed"),
    _data("d.jsonl.gz", gzip.compress(_VALID_LINES.encode())[:-30], "can't be decompressed", name="a gz cut short"),
    _data("d.csv.bz2", "no bzip2", "d.csv.bz2"),
    _data("d.csv.xz", "no xz", "can't be decompressed"),
    _data("d.json.zst", "no zstandard", "d.json.zst"),
    _data("d.parquet.gz", "x", "is not read"),
    _data("d.xlsx", "PK", "save the sheet as csv"),
    _data("d.zip", "PK", "unpack it"),
    _data("d.pkl", "x", "a pickle can run code"),
    _data("d.txt", "a line\n" * 40, "has no column 'label'"),
    _data("d.txt", "\n\n", "is empty", name="a txt of empty lines"),
    _data("d.parquet", "", "is empty"),
    _data("d.parquet", _parquet({"text": [b"a"] * 40, "label": ["a", "b"] * 20}), "expected text", name="bytes"),
    _folder("an address", "is an address", {}, "dataset.path=https://example.org/x.csv"),
    _folder("an address of the Hub", "name of the dataset: org/name", {}, "dataset.path=hf://datasets/org/name"),
    _folder("a pattern without a file", "no file has such a name", {}, path="*.csv"),
    _folder("a pattern of files that are not read", "no file of its 1 is read", {"a.doc": "x"}, path="*"),
    _folder("files of different columns", "have different columns", {"a.csv": _csv(["a"]), "b.csv": "text\na\n"}),
    _folder("a folder with an empty file", "is empty", {"train.csv": _csv(["a"]), "test.csv": ""}),
    _folder(
        "a folder with a broken line", "test.jsonl, line 2", {"train.jsonl": _VALID_LINES, "test.jsonl": "{}\n{\n"}
    ),
    _folder(
        "a folder without a train split", "Unknown split 'train'", {"dev.csv": _csv(["a"]), "test.csv": _csv(["a"])}
    ),
    _folder(
        "a split with a typo",
        "Did you mean 'test'",
        {"train.csv": _csv(["a"]), "test.csv": _csv(["a"])},
        "dataset.test_split=tset",
    ),
]
