"""Answers with a label, desirable or not, from the formats that datasets have for them (KTO)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_recipes.data.formats import checked_messages, plain_prompt, wrong_value
from peft_recipes.data.preferences import EMPTY, NO_PROMPT, preference_rows
from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

_LABELS = {1: True, 0: False, "true": True, "false": False}  # True and False are equal to 1 and 0


def unpaired_rows(rows: datasets.Dataset, source: Dataset, chat: bool) -> tuple[datasets.Dataset, Counter[str]]:
    """Rows with `id`, `prompt`, `completion`, `label` in trl's format, and the reasons why others were left out.

    Rows have a prompt, a completion and a label (true or false, 1 or 0); prompt and completion as text or messages.
    Pairs (chosen, rejected) become two rows each, in an order drawn from the dataset's seed. chat: as in
    `preference_rows`. Raises RecipeError with the row: a missing column, a value of another type, no usable row.
    """
    import datasets

    if source.completion not in rows.column_names and {source.chosen, source.rejected} <= set(rows.column_names):
        pairs, left_out = preference_rows(rows, source, chat)
        both = [
            {"id": f"{pair['id']}-{key}", "prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
            for pair in pairs
            for key in ("chosen", "rejected")
        ]
        order = np.random.default_rng(source.seed).permutation(len(both))
        return datasets.Dataset.from_list([both[i] for i in order]), left_out
    keys = ("prompt", "completion", "label")
    for key in keys:
        if getattr(source, key) not in rows.column_names:
            raise RecipeError(missing_column(getattr(source, key), key, rows.column_names, source.path))
    left_out, examples = Counter(), []
    for row in rows:
        example = _example({key: row[getattr(source, key)] for key in keys}, row["id"], source)
        if isinstance(example, str):
            left_out[example] += 1
        else:
            examples.append({"id": row["id"], **_as_trl(example, chat)})
    if not examples:
        why = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        raise RecipeError(f"dataset '{source.path}': no row is a usable answer ({why}).")
    return datasets.Dataset.from_list(examples), left_out


def _example(values: dict[str, Any], row: str, source: Dataset) -> dict[str, Any] | str:
    """The prompt and completion of a row as messages, with its label, or the reason why it can't be used."""
    label = values["label"].strip().lower() if isinstance(values["label"], str) else values["label"]
    if not isinstance(label, (bool, int, float, str)) or label not in _LABELS:
        raise wrong_value(source.path, row, source.label, "expected true or false,", values["label"])
    example = {"label": _LABELS[label]}
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = values[key]
        if isinstance(value, list) and value:
            messages = checked_messages(value, getattr(source, key), row, source.path)
            example[key] = [{"role": message["role"], "content": message["content"]} for message in messages]
        elif value is None or isinstance(value, (str, list)):
            example[key] = [{"role": role, "content": value or ""}]
        else:
            raise wrong_value(source.path, row, getattr(source, key), "expected text or a list of messages,", value)
    if not any(message["content"].strip() for message in example["prompt"]):
        return NO_PROMPT
    return example if any(message["content"].strip() for message in example["completion"]) else EMPTY


def _as_trl(example: dict[str, Any], chat: bool) -> dict[str, Any]:
    if chat:
        return example
    text = {key: "\n\n".join(message["content"] for message in example[key]) for key in ("prompt", "completion")}
    return {**example, "prompt": plain_prompt(text["prompt"]), "completion": text["completion"]}
