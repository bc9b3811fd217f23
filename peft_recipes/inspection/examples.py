"""Examples as the model sees them: the text of their tokens in pieces, labelled or not, with the special tokens."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

from peft_recipes.data.lengths import IGNORED
from peft_recipes.data.prepared import Prepared
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.tasks.base import Task

Part = dict[str, Any]  # name, tokens, labelled (numbers of tokens) and pieces of text


def shown_examples(task: Task, prepared: Prepared, count: int, split: str = "train") -> list[dict[str, Any]]:
    """The first `count` examples of a split as plain data.

    Each has an `id`, a `label` (what the model learns for the complete text or image; else None) and `parts`: the
    sequences of the example, each with a `name` ("" if there is only one), its number of `tokens`, how many are
    `labelled`, and `pieces` {"text", "labelled", "special", "tag"} which together are the decoded sequence.
    Images have a `size` [width, height] and the shape of their `pixel_values`.
    """
    rows = prepared.splits[split]
    made = []
    for number in range(min(count, len(rows))):
        example = {"id": prepared.ids[split][number], "label": None, "parts": []}
        made.append(example | _shown(task, prepared, rows, number))
    return made


def _shown(task: Task, prepared: Prepared, rows: Any, number: int) -> dict[str, Any]:
    recipe, tokenizer = task.recipe, prepared.processor
    if recipe.task == "image-classification":
        return _image(prepared, rows, number)
    row = rows[number]
    if recipe.task == "text-classification":
        label = label_text(row["labels"], prepared.labels, prepared.problem_type)
        return {"label": label, "parts": [part(tokenizer, row["input_ids"], [False] * len(row["input_ids"]))]}
    if recipe.task == "token-classification":
        tags = [None if label == IGNORED else prepared.labels[label] for label in row["labels"]]
        return {"parts": [part(tokenizer, row["input_ids"], [tag is not None for tag in tags], tags=tags)]}
    if recipe.task == "grpo":
        return _prompt(task, prepared, row)
    return {"label": _desirable(recipe, row), "parts": _sequences(recipe, tokenizer, row)}


def _sequences(recipe: Recipe, tokenizer: Any, row: dict[str, Any]) -> list[Part]:
    """The sequences of a language model's example."""
    if recipe.task == "seq2seq":
        sides = (("input", row["input_ids"], False), ("target", row["labels"], True))
        return [part(tokenizer, ids, [labelled] * len(ids), name) for name, ids, labelled in sides]
    if recipe.task == "reward":
        names = ("chosen", "rejected")
        return [part(tokenizer, row[f"{name}_ids"], [False] * len(row[f"{name}_ids"]), name) for name in names]
    if recipe.task in ("dpo", "kto"):
        prompt, names = row["prompt_ids"], ("completion",) if recipe.task == "kto" else ("chosen", "rejected")
        answers = {name: row[f"{name}_ids"] for name in names}
        return [
            part(tokenizer, prompt + ids, [False] * len(prompt) + [True] * len(ids), name if len(names) > 1 else "")
            for name, ids in answers.items()
        ]
    return [part(tokenizer, row["input_ids"], [label != IGNORED for label in row["labels"]])]


def part(
    tokenizer: Any,
    ids: Sequence[int],
    labelled: Sequence[bool],
    name: str = "",
    tags: Sequence[str | None] | None = None,
) -> Part:
    """One sequence of an example. labelled: of each token, whether it has a loss. tags: of each token, or None."""
    special = set(tokenizer.all_special_ids)
    tags = tags or [None] * len(ids)
    # A tag stands for its word, so that each is a piece of its own.
    marks = [
        (has_label, token in special, tag, position if tag else None)
        for position, (has_label, token, tag) in enumerate(zip(labelled, ids, tags, strict=True))
    ]
    pieces = [
        {"text": text, "labelled": mark[0], "special": mark[1], **({"tag": mark[2]} if mark[2] else {})}
        for text, mark in decoded(tokenizer, ids, marks)
    ]
    return {"name": name, "tokens": len(ids), "labelled": sum(labelled), "pieces": pieces}


def decoded(tokenizer: Any, ids: Sequence[int], marks: Sequence[Hashable]) -> list[tuple[str, Any]]:
    """The text of tokens, cut where their marks change: (text, mark) of each run of equal marks.

    Each piece is what it adds to the text before it: a run decoded by itself would lose its leading space
    (SentencePiece) and get the `##` of a continued word. A character whose bytes are in two runs is in the second.
    """
    pieces, before, end = [], "", 0
    for mark, run in itertools.groupby(marks):
        start, end = end, end + sum(1 for _ in run)
        text = _decode(tokenizer, ids[:end])
        own = text[len(before) :] if text.startswith(before) else _decode(tokenizer, ids[start:end])
        unfinished = len(own) - len(own.rstrip("\ufffd")) if end < len(ids) else 0
        pieces.append((own[: len(own) - unfinished], mark))
        before = text[: len(text) - unfinished]
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def label_text(label: Any, names: Sequence[str] | None, problem_type: str | None = None) -> str:
    """A classifier's label in words: a class, several ("-" for none), or a number."""
    if names is None:
        return f"{float(label[0] if isinstance(label, list) else label):g}"
    if isinstance(label, list):  # a 0 or 1 for each class
        return ", ".join(name for name, has in zip(names, label, strict=True) if has) or "-"
    return names[int(label)]


def _desirable(recipe: Recipe, row: dict[str, Any]) -> str | None:
    if recipe.task != "kto":
        return None
    return "desirable" if row["label"] else "undesirable"


def _image(prepared: Prepared, rows: Any, number: int) -> dict[str, Any]:
    return {
        "label": prepared.labels[rows.labels[number]],
        "size": list(rows.rows[number]["image"].size),
        "pixel_values": list(rows[number]["pixel_values"].shape),
    }


def _prompt(task: Any, prepared: Prepared, row: dict[str, Any]) -> dict[str, Any]:
    """A prompt of grpo, whose answers are drawn in training: no token has a label in the data."""
    ids = task.prompt_ids(row, prepared.processor)
    reference = {"label": f"reference: {row['reference']}"} if row["reference"] else {}
    return {**reference, "parts": [part(prepared.processor, ids, [False] * len(ids), "prompt")]}
