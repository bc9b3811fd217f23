"""What a recipe will train on, in figures: rows and examples of each split, lengths, truncation, classes, repeats."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from peft_recipes.data.lengths import IGNORED, Counts, token_counts
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.shapes import detect
from peft_recipes.inspection.examples import label_text, shown_examples
from peft_recipes.recipe.dataset import REGRESSION
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.registry import task_of

_BINS = 10
_STORED_EXAMPLES, _STORED_CHARACTERS = 2, 600
_IDS = ("input_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "prompt")


def look(recipe: Recipe, examples: int = 3) -> dict[str, Any]:
    """Prepare a recipe's data as a run does, and return what `peft-recipes data --json` prints.

    Loads the tokenizer and the configuration, and no weights. examples: how many training examples are shown. Raises
    RecipeError for whatever is wrong with the data.
    """
    task = task_of(recipe)
    prepared = task.prepare()
    return summary(task, prepared) | {"examples": shown_examples(task, prepared, examples)}


def summary(task: Task, prepared: Prepared) -> dict[str, Any]:
    """The figures of prepared data, without examples.

    By split: `rows` of the source, the `examples` made of them and how many were `left_out`, by reason; `lengths` in
    tokens (min, median, p95, max) with a `histogram`; how many examples were `truncated` at max_length and how many
    `labelled_tokens_cut` that costs, with those of examples that were left out; `classes` with their counts, or the
    `numbers` of a regression; `repeated` examples, and those `also_in` other splits.
    """
    recipe = task.recipe
    splits = {split: _split(task, prepared, split) for split in prepared.splits}
    for split, others in _shared(prepared).items():
        splits[split] |= others
    return {
        "recipe": recipe.name,
        "task": recipe.task,
        "model": recipe.model,
        "dataset": recipe.data_name,
        "embedded": recipe.uses_stand_ins,
        "format": found_format(task),
        "columns": [name for name in _columns(task) if name != "id"],
        "problem_type": prepared.problem_type,
        "max_length": None if recipe.task == "image-classification" else recipe.max_length,
        "fingerprint": prepared.fingerprint,
        "splits": splits,
        "notes": list(prepared.notes),
    }


def stored_summary(task: Task, prepared: Prepared) -> dict[str, Any]:
    """The figures with two examples, whose long sequences are shortened: what a comparison stores for its report."""
    examples = shown_examples(task, prepared, _STORED_EXAMPLES)
    for example in examples:
        for one in example["parts"]:
            one["pieces"] = _shortened(one["pieces"])
    return summary(task, prepared) | {"examples": examples}


def _shortened(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pieces with the middle of each long one left out, so that both prompt and answer can be seen."""
    most = max(_STORED_CHARACTERS // max(len(pieces), 1), 40)
    half = most // 2
    return [
        {**piece, "text": f"{piece['text'][:half]} ... {piece['text'][-half:]}"} if len(piece["text"]) > most else piece
        for piece in pieces
    ]


def found_format(task: Task) -> str | None:
    """The format of supervised fine-tuning that the data was read as; None for other tasks and several datasets."""
    if task.recipe.task != "sft" or not task.read or task.recipe.datasets is not None:  # the notes say it of each
        return None
    return str(detect(next(iter(task.read.values())), task.recipe.dataset))


def _columns(task: Task) -> list[str]:
    return list(next(iter(task.read.values())).column_names) if task.read else []


def _split(task: Task, prepared: Prepared, split: str) -> dict[str, Any]:
    rows = prepared.splits[split]
    read, skipped = task.read.get(split), task.skipped.get(split)
    figures: dict[str, Any] = {
        "rows": len(read) if read is not None else None,
        "examples": len(prepared.ids[split]),
        "left_out": {why: len(ids) for why, ids in skipped.reasons.items()} if skipped else {},
        "lengths": None,
        "histogram": None,
        "truncated": 0,
        "labelled_tokens": None,
        "labelled_tokens_cut": 0,
        "classes": _classes(task, prepared, split),
        "numbers": None,
    }
    if prepared.problem_type == REGRESSION:
        figures |= {"classes": None, "numbers": _spread([float(_first(value)) for value in rows["labels"]])}
    counts = token_counts(rows, task.recipe.task)
    if task.recipe.task == "grpo":
        counts = {"tokens": [len(task.prompt_ids(row, prepared.processor)) for row in rows], "labelled": []}
    return figures | _lengths(counts, prepared.whole.get(split), task.recipe.max_length)


def _lengths(counts: Counts | None, whole: Counts | None, max_length: int) -> dict[str, Any]:
    """The lengths of a split, and what truncation costs. whole: counts before truncation, of left-out examples too."""
    if not counts or not counts["tokens"]:
        return {}
    before = whole or counts
    labelled = sum(counts["labelled"]) if counts["labelled"] else None
    return {
        "lengths": _spread(before["tokens"]),
        "histogram": histogram(before["tokens"]),
        "truncated": sum(length > max_length for length in before["tokens"]),
        "labelled_tokens": labelled,
        "labelled_tokens_cut": sum(before["labelled"]) - labelled if labelled is not None else 0,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "min": min(values),
        "median": statistics.median_low(values),
        "p95": percentile(values, 0.95),
        "max": max(values),
        "sum": sum(values),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that is at least as large as a share of them (nearest rank)."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """At most ten bins of equal width: `from`, `to` (inclusive) and the number of `examples`."""
    width = _round_width(max(lengths) / _BINS)
    counts = Counter(max(length - 1, 0) // width for length in lengths)
    return [
        {"from": number * width + 1, "to": (number + 1) * width, "examples": counts.get(number, 0)}
        for number in range(min(counts), max(counts) + 1)
    ]


def _round_width(width: float) -> int:
    """The next width of 1, 2, 4, 5 or 8 times a power of ten: bins that are easy to read."""
    power = 10 ** max(math.floor(math.log10(max(width, 1))), 0)
    return next(int(step * power) for step in (1, 2, 4, 5, 8, 10) if step * power >= width)


def _classes(task: Task, prepared: Prepared, split: str) -> dict[str, int] | None:
    """How many examples (of token classification: words) have each class; None for a task without classes."""
    rows, names = prepared.splits[split], prepared.labels
    if task.recipe.task == "kto":
        counts = Counter("desirable" if label else "undesirable" for label in rows["label"])
        return {name: counts.get(name, 0) for name in ("desirable", "undesirable")}
    if not names:
        return None
    if task.recipe.task == "image-classification":
        found: Iterable[int] = rows.labels
    elif task.recipe.task == "token-classification":
        found = (label for labels in rows["labels"] for label in labels if label != IGNORED)
    else:
        return _text_classes(rows["labels"], names)
    counts = Counter(map(int, found))
    return {name: counts.get(number, 0) for number, name in enumerate(names)}


def _text_classes(labels: Iterable[Any], names: Sequence[str]) -> dict[str, int]:
    """Of single classes, or of vectors with a 0 or 1 for each class."""
    counts: Counter[str] = Counter()
    for label in labels:
        many = isinstance(label, list)
        counts.update([n for n, has in zip(names, label, strict=True) if has] if many else [label_text(label, names)])
    return {name: counts.get(name, 0) for name in names}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _shared(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """By split: examples that repeat an earlier one of it, and those that are also in a later split.

    Compared as the model sees them, so that texts which differ only behind max_length are equal. Images, which are
    compared by their pixels when the data is prepared, are left out.
    """
    keys: dict[str, list[int]] = {}
    for split, rows in prepared.splits.items():
        columns = [name for name in _IDS if name in (getattr(rows, "column_names", None) or ())]
        if not columns:
            return {}
        keys[split] = [hash(json.dumps(values)) for values in zip(*(rows[name] for name in columns), strict=True)]
    found, names = {}, list(keys)
    for number, split in enumerate(names):
        counts = Counter(keys[split])
        also = {other: sum(counts[key] for key in set(keys[other]) & set(counts)) for other in names[number + 1 :]}
        repeated = len(keys[split]) - len(counts)
        found[split] = {"repeated": repeated, "also_in": {other: count for other, count in also.items() if count}}
    return found
