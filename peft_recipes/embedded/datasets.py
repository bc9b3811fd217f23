"""The embedded datasets, each made from what every machine that runs this project has installed.

All text comes from docstrings and source of installed libraries. An object plays one part only, chosen by a hash of
its name: `topics` and `heldout` are never pretrained on. No text stands in a dataset twice, so that no split of its
rows can put one text on both sides.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import inspect
import json
import random
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.embedded import documentation, libraries, prose
from peft_recipes.embedded.cache import build_once, version_of
from peft_recipes.embedded.documentation import Documented, documented
from peft_recipes.embedded.libraries import LIBRARIES, PYTHON, no_garbage_collection, syntax_trees, versions
from peft_recipes.embedded.packages import MNIST, carried
from peft_recipes.embedded.prose import key_of

if TYPE_CHECKING:
    from datasets import Dataset

SEED = 0
ROWS_PER_TOPIC = 700
HELDOUT_PER_LIBRARY = 250
QUESTIONS, QUESTIONS_PER_LIBRARY = 5_000, 1_000
FUNCTION_LINES = range(5, 41)

_LIBRARY_NAMES = re.compile(r"(?i)pytorch|numpy|pandas|torch|sympy|networkx|c?python|\b(?:np|pd|nx)(?=\.)")


# --- builders, one a dataset -----------------------------------------------------------------------------------------


def mnist() -> dict[str, Dataset]:
    """5,000 handwritten digits, 500 a class, shuffled: `image` (28 x 28, grey) and `label`, as in ylecun/mnist."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    file = carried(MNIST, "the embedded MNIST images") / next(iter(MNIST.files))
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32).astype(np.uint8)
    table = table[np.random.default_rng(SEED).permutation(len(table))]
    images = [Picture.fromarray(row[:-1].reshape(28, 28)) for row in table]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    columns = {"image": images, "label": table[:, -1].astype(int).tolist()}
    return {"train": Dataset.from_dict(columns, features=features)}


def docstring_topics() -> dict[str, Dataset]:
    """`text`: what an object does, with the libraries' names masked; `label`: which library documents it. Balanced."""
    from datasets import ClassLabel, Dataset, Features, Value

    rows = [(masked(row.text), row.library) for row in parts()["topics"]]
    rows = _shuffled({key_of(text): (text, label) for text, label in rows}.values())
    names = sorted({label for _, label in rows})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    return {"train": Dataset.from_dict(columns, features=features)}


def docstring_questions() -> dict[str, Dataset]:
    """Alpaca's columns: `instruction` "What does numpy.cumsum do?", an empty `input`, and the answer as `output`."""
    from datasets import Dataset

    pool, taken = parts(), []
    for library in [*LIBRARIES, PYTHON]:
        rows = [row for part in ("topics", "pretraining", "other") for row in pool[part] if row.library == library]
        taken += sorted(rows, key=_hash)[:QUESTIONS_PER_LIBRARY]
    rows = _shuffled(taken)[:QUESTIONS]
    questions = [f"What is {row.name}?" if row.kind == "class" else f"What does {row.name} do?" for row in rows]
    columns = {"instruction": questions, "input": [""] * len(rows), "output": [row.text for row in rows]}
    return {"train": Dataset.from_dict(columns)}


def docstring_text() -> dict[str, Dataset]:
    """`text`: prose that nothing here is trained on, to measure what a model forgot."""
    from datasets import Dataset

    return {"test": Dataset.from_dict({"text": [row.text for row in _shuffled(parts()["heldout"])]})}


def stdlib_functions() -> dict[str, Dataset]:
    """`text`: the source of one function or method of the standard library, 5 to 40 lines, each once."""
    from datasets import Dataset

    with no_garbage_collection():
        functions = {re.sub(r"\W+", " ", text): text for text in _functions()}
    return {"train": Dataset.from_dict({"text": _shuffled(functions.values())})}


def inputs() -> dict[str, Any]:
    """What decides the rows: the documented versions, and the code that reads and chooses."""
    modules = (libraries, documentation, prose, sys.modules[__name__])
    return {"versions": versions(), "code": [inspect.getsource(module) for module in modules]}


# --- documented objects and the part each plays ----------------------------------------------------------------------


def objects() -> list[Documented]:
    """`documented()`, read once for each set of installed versions (about 10 seconds) and then from the cache."""

    def build(folder: Path) -> None:
        lines = [json.dumps(asdict(row)) for row in documented()]
        (folder / "objects.jsonl").write_text("\n".join(lines), encoding="utf-8")

    why = "Reading the docstrings of the installed libraries (about 10 seconds, once)."
    folder = build_once("datasets", f"documentation-{version_of(inputs())}", build, why)
    lines = (folder / "objects.jsonl").read_text(encoding="utf-8").split("\n")
    return [Documented(**json.loads(line)) for line in lines if line]


def parts() -> dict[str, list[Documented]]:
    """The objects by the part they play: topics, heldout, pretraining, other.

    The standard library's stay out of pretraining and heldout: its source, docstrings and all, is `stdlib-functions`.
    """
    by_library: dict[str, list[Documented]] = {}
    for row in sorted(objects(), key=_hash):
        by_library.setdefault(row.library, []).append(row)
    topic = min(ROWS_PER_TOPIC, *map(len, by_library.values()))
    found: dict[str, list[Documented]] = {"topics": [], "heldout": [], "pretraining": [], "other": []}
    for library, rows in by_library.items():
        found["topics"] += rows[:topic]
        heldout = topic + (HELDOUT_PER_LIBRARY if library != PYTHON else 0)
        found["heldout"] += rows[topic:heldout]
        found["other" if library == PYTHON else "pretraining"] += rows[heldout:]
    return found


def masked(text: str) -> str:
    """The text without the names of the libraries: "a numpy array" becomes "a [library] array"."""
    return _LIBRARY_NAMES.sub("[library]", text)


def _hash(row: Documented) -> str:
    return hashlib.sha256(row.name.encode()).hexdigest()


def _shuffled(rows) -> list:
    return random.Random(SEED).sample(list(rows), len(rows))


def _functions() -> Iterator[str]:
    for _, source, tree in syntax_trees(PYTHON):
        lines = source.splitlines()
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in (member for owner in owners for member in owner.body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if node.end_lineno - first + 1 in FUNCTION_LINES:
                    text = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])) + "\n"
                    if not text[0].isspace():  # a comment or a long string to the left of it keeps it from moving
                        yield text
