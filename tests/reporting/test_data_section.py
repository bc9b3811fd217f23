"""The section of a report that shows what was trained on."""

from __future__ import annotations

from comparison_fixture import sft_comparison
from page import EVIL, Page

from peft_recipes.reporting.data import duplicate_lines, section, split_rows, truncation_line
from peft_recipes.reporting.html import render_html


def split(**changes) -> dict:
    figures = {
        "rows": 40, "examples": 39, "left_out": {"an empty answer": 1}, "truncated": 4, "labelled_tokens": 180,
        "lengths": {"min": 5, "median": 9, "p95": 14, "max": 20, "sum": 400}, "labelled_tokens_cut": 20,
        "histogram": [{"from": 1, "to": 10, "examples": 30}, {"from": 11, "to": 20, "examples": 9}],
        "classes": {EVIL: 30, "b": 9}, "numbers": None, "repeated": 2, "also_in": {"test": 1},
    }  # fmt: skip
    return figures | changes


def looked(**changes) -> dict:
    pieces = [
        {"text": "<|user|>", "labelled": False, "special": True},
        {"text": EVIL, "labelled": True, "special": False, "tag": EVIL},
    ]
    example = {"id": "train-0", "label": EVIL, "parts": [{"name": "", "tokens": 9, "labelled": 1, "pieces": pieces}]}
    data = {"format": "alpaca", "columns": ["a"], "max_length": 10, "notes": [], "examples": [example],
            "splits": {"train": split(), "test": split(rows=8, examples=8, repeated=0, also_in={})}}  # fmt: skip
    return data | changes


def test_the_page_shows_examples_lengths_and_classes_and_escapes_them():
    page = Page(render_html({**sft_comparison(), "data": looked()}, plots=[]))
    assert page.balanced and not page.all("script")
    assert {"href": "#data"} in page.all("a") and page.all("mark") == [{"title": EVIL}]
    assert EVIL in page.text and "Training examples, before truncation" in page.text
    assert "11 to 20" in page.text and "Marked: the tokens that have a loss." in page.text


def test_a_comparison_without_its_data_has_no_such_section():
    assert section({}) is None
    assert {"href": "#data"} not in Page(render_html(sft_comparison(), plots=[])).all("a")


def test_the_sentences_name_the_costs():
    assert truncation_line(looked()) == (
        "4 training examples have more than max_length 10 tokens, which costs 20 of 200 labelled tokens (10 %). "
        "The longest has 20."
    )
    assert truncation_line(looked(splits={"train": split(truncated=0)})) is None
    assert duplicate_lines(looked()) == [
        "2 examples of train repeat another one of it.",
        "1 example of train is also in test, as the model sees it.",
    ]


def test_splits_without_lengths_have_no_such_columns():
    image = split(lengths=None, histogram=None, truncated=0, labelled_tokens=None, labelled_tokens_cut=0)
    assert split_rows(looked(splits={"train": image}))[0] == ["split", "rows", "examples"]
