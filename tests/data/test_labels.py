"""Labels in GLUE's shapes and others: what is accepted, what it becomes, and which row is named in an error."""

import datasets
import pytest
from datasets import ClassLabel, Features, List, Value

from peft_recipes import Dataset, RecipeError
from peft_recipes.data.labels import labelled_texts


def made(source=None, features=None, **columns):
    """What `labelled_texts` makes of rows with an id, the same in every split."""
    count = len(next(iter(columns.values())))
    columns = {"text": [f"text {i}" for i in range(count)], **columns}
    rows = datasets.Dataset.from_dict(columns, features=features).add_column("id", [f"train-{i}" for i in range(count)])
    splits, labels = labelled_texts({"train": rows, "test": rows}, source or Dataset("d"))
    return splits["train"], labels


def test_a_glue_pair_keeps_its_two_texts_and_its_class_names():
    texts = {name: Value("string") for name in ("text", "sentence1", "sentence2")}
    label = ClassLabel(names=["not_equivalent", "equivalent"])
    features = Features({**texts, "label": label, "idx": Value("int32")})
    rows, labels = made(Dataset("mrpc", text=["sentence1", "sentence2"]), features,
                        sentence1=["a", "b"], sentence2=["c", "d"], label=[0, 1], idx=[0, 1])  # fmt: skip
    assert rows[1] == {"id": "train-1", "text": "b", "text_pair": "d", "label": 1}
    assert (labels.problem_type, labels.names) == ("single_label_classification", ["not_equivalent", "equivalent"])
    assert labels.notes == []


def test_columns_may_have_the_names_that_rows_get():
    rows, _ = made(Dataset("d", text=["text_pair", "text"]), text=["a", "b"], text_pair=["c", "d"], label=[0, 1])
    assert rows[0] == {"id": "train-0", "text": "c", "text_pair": "a", "label": 0}


def test_fractions_are_numbers_and_whole_floats_are_classes():
    rows, labels = made(label=[2.5, 5.0, 0.0])
    assert (labels.problem_type, labels.names, rows["label"][:]) == ("regression", None, [2.5, 5.0, 0.0])
    assert "regression" in labels.notes[0]
    rows, labels = made(label=[2.0, 1.0, 1.0])
    assert (labels.names, rows["label"][:], labels.notes) == (["1", "2"], [1, 0, 0], [])
    rows, labels = made(Dataset("stars", problem_type="regression"), label=[2, 1, 1])
    assert (labels.problem_type, rows["label"][:], labels.notes) == ("regression", [2.0, 1.0, 1.0], [])


def test_lists_are_several_classes_by_name_number_or_feature():
    rows, labels = made(label=[["b", "a"], [], ["c"]])
    assert (labels.names, rows["label"][:]) == (["a", "b", "c"], [[0, 1], [], [2]])
    assert "several classes" in labels.notes[0]
    rows, labels = made(label=[[7, 3], [3]])
    assert (labels.names, rows["label"][:]) == (["3", "7"], [[0, 1], [0]])
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["joy", "fear", "love"]))})
    rows, labels = made(None, features, label=[[2, 0], [1]])
    assert (labels.names, rows["label"][:]) == (["joy", "fear", "love"], [[0, 2], [1]])
    rows, labels = made(Dataset("d", labels=["x", "y"]), label=[[1], ["y", "x"][:0]])
    assert (labels.names, rows["label"][:]) == (["x", "y"], [[1], []])


@pytest.mark.parametrize(
    ("source", "labels", "message"),
    [
        ({}, [-1, -1], "every label of its train split is -1"),
        ({}, [[1, 0, 1], [0, 0, 1]], "row train-0: [1, 0, 1] names a class twice"),
        ({}, [["a"], None], "row train-1, column 'label': a label is a list of class names or numbers, got None"),
        ({"labels": ["a", "b"]}, [["a"], ["c"]], "row train-1: label 'c' is not one of the classes: a, b"),
        ({}, [0.5, None], "row train-1, column 'label': a label is a finite number, got None"),
        ({}, [0.5, float("inf")], "a label is a finite number, got inf"),
        ({}, [0.5, -100.0], "transformers takes the label -100 for one to leave out"),
        ({"problem_type": "regression"}, ["good", "bad"], "a label is a finite number, got 'good'"),
        ({"problem_type": "multi_label_classification"}, ["good", "bad"], "a label is a list of class names"),
        ({"text": ["text", "other"]}, [0, 1], "dataset.text=[FIRST,SECOND]"),
        ({"label": "lable"}, [0, 1], "Did you mean 'label'"),
    ],
)
def test_a_wrong_label_names_its_row(source, labels, message):
    with pytest.raises(RecipeError) as raised:
        made(Dataset("d", **source), label=labels)
    assert message in str(raised.value), str(raised.value)


def test_a_text_that_is_missing_from_a_pair_names_its_row():
    with pytest.raises(RecipeError, match="row train-1, column 'second': expected text"):
        made(Dataset("d", text=["text", "second"]), second=["a", None], label=[0, 1])


def test_true_and_false_are_classes():
    rows, labels = made(label=[True, False])
    assert (labels.names, rows["label"][:]) == (["False", "True"], [1, 0])


def test_classes_that_differ_in_case_or_blanks_are_noted():
    _, labels = made(label=["spam", "Spam ", "ham"])
    assert labels.notes == ["Classes that differ in case or blanks alone: 'Spam ' and 'spam'. Each is one of its own."]
