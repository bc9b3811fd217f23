"""Every shape of data that LLaMA-Factory, axolotl and TRL document is trained on right, or refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from byte_base import save_byte_base
from documented_shapes import SHAPES

from peft_recipes import Arm, Dataset, Recipe, RecipeError
from peft_recipes.tasks.registry import task_of

IGNORED = -100


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_byte_base(tmp_path_factory.mktemp("byte-base"))


def prepared_from(rows, base, folder, task, **dataset):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train": 4, "validation": 2, "test": 2, "chat_template": "chatml"} | dataset
    recipe = Recipe(name="shape", task=task, model=str(base), dataset=Dataset(str(path), **options), max_length=900,
                    arms={"full": Arm(learning_rate=1e-3)})  # fmt: skip
    return task_of(recipe).prepare()


def shown(prepared, row) -> str:
    """An example with its labelled tokens in brackets, ChatML's tags as "role: ... / role: ..."."""
    decode = prepared.processor.decode
    if "labels" in row:
        text, inside = "", False
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if (label != IGNORED) != inside:
                text, inside = text + "[]"[inside], not inside
            text += decode([token])
        text += "]" * inside
    else:
        keys = [key for key in ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids") if key in row]
        text = " | ".join(decode(row[key]) for key in keys)
    text = re.sub(r"<\|im_start\|>(\w+)\n", r"\1: ", text)
    text = re.sub(r"<\|im_end\|>\n?(\]?)", r"\1 / ", text)
    return re.sub(r" +", " ", text).replace(" / |", " |").strip(" /")


@pytest.mark.parametrize("name", SHAPES)
def test_a_documented_shape_is_learnt_right_or_refused_by_name(name, base, tmp_path):
    task, row, expected = SHAPES[name]
    rows = [row(n) for n in range(8)]
    if expected.startswith("refused: "):
        with pytest.raises(RecipeError, match=re.escape(expected.removeprefix("refused: "))):
            prepared_from(rows, base, tmp_path, task)
        return
    prepared = prepared_from(rows, base, tmp_path, task)
    for one_id, example in zip(prepared.ids["train"], prepared.splits["train"], strict=True):
        assert shown(prepared, example) == expected.replace("{n}", one_id.split("-")[1])


def test_the_docs_list_every_shape():
    page = (Path(__file__).parents[2] / "docs/guides/data-formats.md").read_text(encoding="utf-8")
    assert [name for name in SHAPES if f"| {name} |" not in page] == []
