"""Training examples as a stream: the preparation of a task, applied to chunks of rows while it trains.

The functions take a `Task` (base.py, which imports this file).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from peft_recipes.data import formats
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.streaming import KEPT, SAMPLE, Stream, streamed_splits
from peft_recipes.distributed import processes
from peft_recipes.errors import RecipeError

_ALL_BUT_ONE = 1 - 1e-9  # of a chunk: rows that can't be used are left out, whatever `skip_rows` allows


def open_stream(task: Any) -> dict[str, Any]:
    """The raw splits of the task's recipe, of train a sample; `task.stream` is the rest.

    Raises RecipeError in a run of several processes, which would need a share of the stream each.
    """
    if processes.count() > 1:
        raise RecipeError("dataset.streaming: reads the data in one process. Start the run without --processes.")
    splits, task.stream = streamed_splits(task.recipe.dataset, task.notes)
    return splits


def attach(
    task: Any, prepared: Prepared, raw: Any, texts: Any, columns: list[str], convert: Callable[[Any], Any]
) -> Prepared:
    """Let the training examples of `prepared` come from the task's stream, if it has one.

    raw, texts: its splits as they were read, and in the form of the task. columns: by which an example of the stream is
    one of another split, which leaves it out. convert: raw rows of one chunk -> rows in the task's form, and a function
    from those to tokenised examples with an `id`.
    """
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    stream: Stream | None = task.stream
    if stream is None:
        return prepared
    evaluated: set[str] = set()
    if task.guards("duplicates"):
        for name in ("validation", "test"):
            evaluated |= set(formats.content_keys(texts[name], columns) if name in texts else ())
    usable = set(prepared.ids["train"])
    stream.example = next(row for row in raw["train"] if row["id"] in usable)
    source = dataclasses.replace(task.recipe.dataset, skip_rows=_ALL_BUT_ONE)
    changes = {key: task.settled.get(key) for key in ("labels", "problem_type", "train_on")}
    source = dataclasses.replace(source, **{key: value for key, value in changes.items() if value is not None})

    def converted(chunk: Any) -> Any:
        skipped, task.skipped, task.reading = task.skipped, {}, source
        silent = are_progress_bars_disabled()
        disable_progress_bars()  # a bar for each chunk would fill the terminal
        try:
            rows, tokenise = convert(chunk)
            keys, ids = formats.content_keys(rows, columns), list(rows["id"])
            kept = [i for i, key in enumerate(keys) if key not in evaluated or ids[i] == KEPT]
            return tokenise(rows.select(kept) if len(kept) < len(rows) else rows)
        finally:
            task.skipped, task.reading = skipped, None
            if not silent:
                enable_progress_bars()

    stream.convert, stream.features = converted, prepared.splits["train"].features
    prepared.stream = stream
    prepared.notes.append(
        f"The training examples are streamed: checks, lengths and the fingerprint know the first {SAMPLE} of them at "
        "most, and rows that can't be used or are in validation or test are left out as they come."
    )
    return prepared
