"""Answers with a label, desirable or not, from the formats that datasets have for them (KTO)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_recipes.data.conversations import ASSISTANT, settled
from peft_recipes.data.formats import as_text, needs_template, plain_conversation, wrong_value
from peft_recipes.data.preferences import preference_notes, preference_rows
from peft_recipes.data.shapes import PAIRS, Shape, check_named, find_prompt, unused_note, with_extras
from peft_recipes.data.skipped import EMPTY, ENDS_WITHOUT, NO_PROMPT, SkippedRows
from peft_recipes.data.sources import missing_column
from peft_recipes.data.supervised import conversation, converted
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.dataset import Dataset

if TYPE_CHECKING:
    import datasets

_LABELS = {1: True, 0: False, "true": True, "false": False, "1": True, "0": False}  # True and False equal 1 and 0
_LABEL_NAMES = ("label", "kto_tag")


def unpaired_notes(rows: datasets.Dataset, source: Dataset) -> list[str]:
    """A note on the columns of labelled answers that nothing reads, or none."""
    if _are_pairs(rows.column_names, source):
        return preference_notes(rows, source)
    shape, label = _shape(rows.column_names, source)
    return unused_note(rows.column_names, shape.used() | {label})


def unpaired_rows(rows: datasets.Dataset, source: Dataset, chat: bool, skipped: SkippedRows) -> datasets.Dataset:
    """Rows with `id`, `prompt`, `completion`, `label` in trl's format. Rows that can't be used go to `skipped`.

    Rows have a prompt, a completion and a label (true or false, 1 or 0); prompt and completion as text or messages, or
    both as one conversation. Pairs (chosen, rejected) become two rows each, in an order drawn from the dataset's seed.
    chat: as in `preference_rows`. Raises RecipeError with the row: a missing column, a value of another type, too many
    unusable rows.
    """
    import datasets

    if _are_pairs(rows.column_names, source):
        pairs = preference_rows(rows, source, chat, skipped)
        others = [name for name in pairs.column_names if name not in ("id", "chosen", "rejected")]
        both = [
            {"id": f"{pair['id']}-{key}", "completion": pair[key], "label": key == "chosen"}
            | {name: pair[name] for name in others}
            for pair in pairs
            for key in ("chosen", "rejected")
        ]
        order = np.random.default_rng(source.seed).permutation(len(both))
        return datasets.Dataset.from_list([both[i] for i in order], on_mixed_types="use_json")
    shape, label = _shape(rows.column_names, source)

    def example_of(row: dict[str, Any]) -> dict[str, Any] | str:
        example = _example(row, shape, label, source)
        return example if chat or isinstance(example, str) else _plain(example, row["id"], source)

    return converted(rows, example_of, shape, source, chat, skipped)


def _are_pairs(columns: list[str], source: Dataset) -> bool:
    return source.completion not in columns and {source.chosen, source.rejected} <= set(columns)


def _shape(columns: list[str], source: Dataset) -> tuple[Shape, str]:
    """The columns of prompt, completion and label. Raises RecipeError for one that is missing."""
    columns = [name for name in columns if name != "id"]
    check_named(columns, source, ("prompt", "completion", "messages", "label"))
    names = _LABEL_NAMES if source.label == Dataset("").label else (source.label,)
    label = next((name for name in names if name in columns), None)
    if label is None:
        raise RecipeError(missing_column(source.label, "label", columns, source.path))
    shape = find_prompt(columns, source)
    completion = source.completion
    if shape and not shape.messages and completion not in columns:
        completion = next(
            (answer for prompt, answer in PAIRS if prompt == shape.prompt and answer in columns), completion
        )
    if shape is None or (not shape.messages and completion not in columns):
        key = "prompt" if shape is None else "completion"
        raise RecipeError(missing_column(getattr(source, key), key, columns, source.path))
    shape = shape if shape.messages else replace(shape, completion=completion)
    return with_extras(shape, [name for name in columns if name != label], source), label


def _example(row: dict[str, Any], shape: Shape, label: str, source: Dataset) -> dict[str, Any] | str:
    """The prompt and completion of a row as messages, with its label, or the reason why it can't be used."""
    value = row[label].strip().lower() if isinstance(row[label], str) else row[label]
    if not isinstance(value, (bool, int, float, str)) or value not in _LABELS:
        raise wrong_value(source.path, row["id"], label, "expected true or false,", row[label])
    messages, given = conversation(row, source, shape)
    messages = settled([{k: v for k, v in message.items() if k != "train"} for message in messages])
    given = given or len(messages) - 1
    prompt, completion = messages[:given], messages[given:]
    if not any(message["content"].strip() for message in prompt):
        return NO_PROMPT
    if not any(message["content"].strip() or message.get("tool_calls") for message in completion):
        return EMPTY
    if completion[-1]["role"] != ASSISTANT:
        return ENDS_WITHOUT
    return {"label": _LABELS[value], "prompt": prompt, "completion": completion}


def _plain(example: dict[str, Any], row: str, source: Dataset) -> dict[str, Any]:
    """The example as text, for a base without a chat template."""
    if len(example["completion"]) > 1 or "tool_calls" in example["completion"][0]:
        raise needs_template("an answer of several messages, or tool calls,", row, source)
    prompt = plain_conversation(example["prompt"], row, source)
    return {**example, "prompt": prompt, "completion": as_text(example["completion"])}
