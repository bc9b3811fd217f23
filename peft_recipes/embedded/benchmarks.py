"""The embedded benchmark: multiple choice about what the installed libraries document, as a task of lm_eval.

`docstring-choices` asks what an object does or is, and offers four first sentences of docstrings: the object's own and
those of three other objects of its library, of about the same length. All of them are held out: no embedded model is
pretrained on them, and no embedded dataset trains on them (`objects_by_use()["heldout"]`, of which `docstring-text`
takes the plain prose to measure forgetting). So a run on `docstring-questions` has seen the form of the questions, and
other objects of the libraries, but none of the answers. Sentences that contain the object's own name are left out:
they could be found by comparing letters.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_recipes.embedded import datasets
from peft_recipes.embedded.cache import build_once, version_of
from peft_recipes.embedded.documentation import Documented

NAMES = ("docstring-choices",)
CHOICES = 4
_NEIGHBOURS = 12  # objects of about the same length of sentence, of which the wrong choices are drawn
_TASK = """\
# Made by peft_recipes from the docstrings of the installed libraries.
task: docstring-choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc_norm  # the likeliest choice by byte: the choices are whole sentences
    aggregation: mean
    higher_is_better: true
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def task_file(name: str) -> Path:
    """Return the file of an embedded benchmark's lm_eval task; its questions are next to it. Made on first use."""
    assert name in NAMES, name

    def build(folder: Path) -> None:
        lines = [json.dumps(row) for row in questions(datasets.objects_by_use()["heldout"])]
        (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(_TASK, encoding="utf-8")

    version = version_of(datasets.inputs(), Path(sys.modules[__name__].__file__).read_text(encoding="utf-8"))
    message = "Making the embedded benchmark of the installed libraries' docstrings."
    return build_once("benchmarks", f"{name}-{version}", build, message) / f"{name}.yaml"


def questions(objects: list[Documented]) -> list[dict[str, Any]]:
    """Make a question of each object: `question`, `choices` and `label`, the right one's index. In random order."""
    draw, rows = random.Random(datasets.SEED), []
    for library in sorted({row.library for row in objects}):
        known = sorted(_sentences(row for row in objects if row.library == library))
        for place, (_, sentence, question) in enumerate(known):
            first = max(0, min(place - _NEIGHBOURS // 2, len(known) - _NEIGHBOURS - 1))
            near = [other for _, other, _ in known[first : first + _NEIGHBOURS + 1] if other != sentence]
            if len(near) < CHOICES - 1:
                continue
            choices = draw.sample([sentence, *draw.sample(near, CHOICES - 1)], CHOICES)
            rows.append({"question": question, "choices": choices, "label": choices.index(sentence)})
    return draw.sample(rows, len(rows))


def _sentences(objects: Iterator[Documented]) -> Iterator[tuple[int, str, str]]:
    """Yield (length, first sentence, question) of each object whose sentence does not contain its name."""
    seen = set()
    for row in objects:
        sentence = re.split(r"(?<=[.!?])\s(?=[A-Z])", row.text, maxsplit=1)[0]
        name = row.name.rsplit(".", 1)[-1]
        if name.lower() not in sentence.lower() and sentence not in seen and len(sentence.split()) >= 4:
            seen.add(sentence)
            yield len(sentence), sentence, row.question
