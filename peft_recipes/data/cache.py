"""A comparison's prepared data on disk, made once for all its runs: splits as Arrow files, the rest as JSON."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from peft_recipes.data.prepared import Prepared
from peft_recipes.recipe.recipe import Recipe

_REST = "prepared.json"
_FIELDS = ("ids", "fingerprint", "labels", "notes", "samples", "prompts", "problem_type")


@contextlib.contextmanager
def stored(prepared: Prepared, folder: Path) -> Iterator[Path | None]:
    """Store prepared data in a folder while a comparison lasts.

    None for images, which are faster to prepare again, and for a stream, which is read by each run.
    """
    import datasets

    if prepared.stream is not None or not all(isinstance(rows, datasets.Dataset) for rows in prepared.splits.values()):
        yield None
        return
    shutil.rmtree(folder, ignore_errors=True)  # left by a comparison that was killed
    try:
        for name, rows in prepared.splits.items():
            rows.save_to_disk(folder / name)
        rest = {key: getattr(prepared, key) for key in _FIELDS}
        (folder / _REST).write_text(json.dumps(rest), encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read(folder: Path, recipe: Recipe) -> Prepared:
    """Load the data that `stored` wrote into memory, with the recipe's tokenizer."""
    import datasets

    from peft_recipes.models import bases

    rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
    splits = {name: datasets.load_from_disk(folder / name, keep_in_memory=True) for name in rest["ids"]}
    return Prepared(splits, processor=bases.load_tokenizer(recipe), folder=folder, **rest)
