"""The embedded sentences whose names are tagged by the markup of docstrings, which is removed."""

from __future__ import annotations

import pytest

from peft_recipes.embedded import datasets, names
from peft_recipes.embedded.documentation import Documented

KNOWN = {"cumsum": "FUNCTION", "Tensor": "CLASS"}


def tagged(docstring: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Text, and the tagged names with their labels, of each sentence of a docstring."""
    return [
        (row["text"], [(row["text"][span["start"] : span["end"]], span["label"]) for span in row["spans"]])
        for row in names.tagged_sentences(docstring, KNOWN)
    ]


def test_roles_parameters_and_values_become_spans_of_a_text_without_markup():
    docstring = (
        "Return the sum of `arr` as a :class:`~torch.Tensor`, like :func:`numpy.cumsum()`, or\n"
        "``None`` if *arr* is empty.\n\nParameters\n----------\narr : array_like\n    Input."
    )
    text = "Return the sum of arr as a Tensor, like numpy.cumsum, or None if arr is empty."
    labels = ["PARAMETER", "CLASS", "FUNCTION", "VALUE", "PARAMETER"]
    assert tagged(docstring) == [
        (text, list(zip(["arr", "Tensor", "numpy.cumsum", "None", "arr"], labels, strict=True)))
    ]


@pytest.mark.parametrize(
    "listed",
    ["Parameters\n----------\naxis : int\n", "Args:\n    axis (int): The axis.", ":param axis: the axis",
     ":param int axis: the axis"],
)  # fmt: skip
def test_parameters_are_found_in_every_style(listed):
    sentence = "The values are summed along `axis` in the order they have."
    assert tagged(f"{sentence}\n\n{listed}") == [(sentence.replace("`", ""), [("axis", "PARAMETER")])]


@pytest.mark.parametrize(
    "sentence",
    [
        "The values are summed along the given axis and returned.",  # no name
        "The values of `unknown` are summed in the order they have.",  # a name of no known kind
        "The values of ``x[0] + 1`` are summed in the order they have.",  # code
        "Use `cumsum` for the values, because cumsum is faster than others.",  # a name without markup as well
        "Sum by `cumsum`.",  # too short
        ">>> print(`cumsum` of all the values that are there to sum).",
    ],
)
def test_a_sentence_whose_names_are_not_all_clear_is_left_out(sentence):
    assert tagged(sentence) == []


def test_the_dataset_has_no_text_twice_and_every_span_is_a_name(monkeypatch):
    texts = [
        f"Return the {what} of the values, like `cumsum` does for all of them."
        for what in ("sum", "Sum", "mean", "product")
    ]
    objects = [
        Documented("numpy", "numpy.cumsum", "function", "", ""),
        *(Documented("numpy", f"numpy.f{i}", "function", "", text) for i, text in enumerate(texts)),
    ]
    monkeypatch.setattr(datasets, "objects", lambda: objects)
    uses = {"topics": objects, "pretraining": [], "other": [], "heldout": []}
    monkeypatch.setattr(datasets, "objects_by_use", lambda: uses)
    rows = names.docstring_names()["train"]
    assert len(rows) == 3  # "sum" and "Sum" are one text
    for row in rows:
        assert [row["text"][span["start"] : span["end"]] for span in row["spans"]] == ["cumsum"]
        assert [span["label"] for span in row["spans"]] == ["FUNCTION"]


def test_names_of_parameters_are_known_as_no_function():
    objects = [
        Documented("numpy", "numpy.copy", "function", "", "Copy.\n\ncopy : bool\n    Whether."),
        Documented("numpy", "numpy.unique", "function", "", "Unique."),
    ]
    known = names._known(objects)
    assert known["unique"] == "FUNCTION" and "copy" not in known and known["ndarray"] == "CLASS"
