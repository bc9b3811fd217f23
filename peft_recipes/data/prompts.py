"""Prompts to answer, with references where there are some, from the formats of supervised fine-tuning."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from peft_recipes.data.formats import checked_messages, plain_prompt, wrong_value
from peft_recipes.data.preferences import NO_PROMPT
from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

NO_REFERENCE = "no reference"


def prompt_rows(
    rows: datasets.Dataset, source: Dataset, chat: bool, references: bool
) -> tuple[datasets.Dataset, Counter[str]]:
    """Rows with `id`, `prompt` in trl's format, `reference` (text) and `row`, and why others were left out.

    The columns are those that `source` names as prompt and completion, as text or messages; references: whether the
    second must exist, else it is "" where it does not. row: all columns of the data, as JSON. chat: the tokenizer has a
    chat template, so that text becomes messages. Raises RecipeError with the row: a missing column, another type.
    """
    import datasets

    keys = ("prompt", "completion") if references or source.completion in rows.column_names else ("prompt",)
    for key in keys:
        if getattr(source, key) not in rows.column_names:
            raise RecipeError(missing_column(getattr(source, key), key, rows.column_names, source.path))
    left_out: Counter[str] = Counter()
    examples = []
    for row in rows:
        values = {key: _messages(row[getattr(source, key)], getattr(source, key), row["id"], source) for key in keys}
        prompt, reference = values["prompt"], _text(values.get("completion", []))
        if not _text(prompt).strip():
            left_out[NO_PROMPT] += 1
        elif references and not reference.strip():
            left_out[NO_REFERENCE] += 1
        else:
            shown = {key: value for key, value in row.items() if key != "id"}
            examples.append({
                "id": row["id"],
                "prompt": prompt if chat else plain_prompt(_text(prompt)),
                "reference": reference,
                "row": json.dumps(shown, default=str),
            })  # fmt: skip
    if not examples:
        why = ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
        raise RecipeError(f"dataset '{source.path}': no row is a usable prompt ({why}).")
    return datasets.Dataset.from_list(examples), left_out


def _messages(value: Any, column: str, row: str, source: Dataset) -> list[dict[str, str]]:
    """A value as messages. Numbers are text: a reference may be one."""
    if isinstance(value, list) and value:
        checked = checked_messages(value, column, row, source.path)
        return [{"role": message["role"], "content": message["content"]} for message in checked]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, (str, list)):
        raise wrong_value(source.path, row, column, "expected text or a list of messages,", value)
    return [{"role": "user", "content": value or ""}]


def _text(messages: list[dict[str, str]]) -> str:
    return "\n\n".join(message["content"] for message in messages)
