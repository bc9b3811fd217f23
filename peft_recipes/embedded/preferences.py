"""The embedded preferences: for a question about an object its own paragraph, against another object's."""

from __future__ import annotations

import inspect
import random
import sys
from typing import TYPE_CHECKING, Any

from peft_recipes.embedded import datasets
from peft_recipes.embedded.libraries import LIBRARIES, PYTHON

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS_PER_LIBRARY = 300


def docstring_preferences() -> dict[str, Dataset]:
    """`prompt` "What does numpy.cumsum do?", `chosen`: its paragraph, `rejected`: one of another object of its library.

    Each object plays in one row only, so that no text stands on two sides of a split, or is chosen in one row and
    rejected in another: the answer alone does not tell which one is preferred.
    """
    from datasets import Dataset

    pool, taken = datasets.parts(), []
    for library in [*LIBRARIES, PYTHON]:  # sorted by a hash of their names: neighbours have nothing to do with another
        rows = [row for part in ("topics", "pretraining", "other") for row in pool[part] if row.library == library]
        rows = rows[: 2 * PAIRS_PER_LIBRARY]
        taken += zip(rows[::2], rows[1::2], strict=False)
    pairs = random.Random(datasets.SEED).sample(taken, len(taken))
    columns = {
        "prompt": [f"What is {a.name}?" if a.kind == "class" else f"What does {a.name} do?" for a, _ in pairs],
        "chosen": [asked.text for asked, _ in pairs],
        "rejected": [other.text for _, other in pairs],
    }
    return {"train": Dataset.from_dict(columns)}


def inputs() -> dict[str, Any]:
    """What decides the rows: what decides the other docstring datasets', and the code that pairs them."""
    return {**datasets.inputs(), "pairs": inspect.getsource(sys.modules[__name__])}
