"""Prompts to answer, with references where there are some, from the formats of supervised fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from peft_recipes.data.formats import as_text, plain_conversation
from peft_recipes.data.shapes import Shape, with_extras
from peft_recipes.data.skipped import NO_PROMPT, SkippedRows
from peft_recipes.data.sources import missing_column
from peft_recipes.data.supervised import conversation, read_side
from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    import datasets

    from peft_recipes.recipe.dataset import Dataset

NO_REFERENCE = "no reference"


def prompt_rows(
    rows: datasets.Dataset, source: Dataset, chat: bool, references: bool, skipped: SkippedRows
) -> datasets.Dataset:
    """Rows with `id`, `prompt` in trl's format, `reference` (text) and `row`. Unusable ones go to `skipped`.

    The columns are those that `source` names as prompt and completion, as text or messages; references: whether the
    second must exist, else it is "" where it does not. row: all columns of the data, as JSON. chat: the tokenizer has a
    chat template, so that text becomes messages. A system message, earlier turns and a context are part of the prompt.
    Raises RecipeError with the row: a missing column, another type.
    """
    import datasets

    has_reference = references or source.completion in rows.column_names
    for key in ("prompt", "completion") if has_reference else ("prompt",):
        if getattr(source, key) not in rows.column_names:
            raise RecipeError(missing_column(getattr(source, key), key, rows.column_names, source.path))
    shape, examples = prompt_shape(rows.column_names, source), []
    for row in rows:
        prompt, _ = conversation(row, source, shape)
        reference = as_text(read_side(row, source.completion, "user", source)) if has_reference else ""
        if not as_text([message for message in prompt if message["role"] != "system"]).strip():
            skipped.add(row["id"], NO_PROMPT)
        elif references and not reference.strip():
            skipped.add(row["id"], NO_REFERENCE)
        else:
            shown = {key: value for key, value in row.items() if key != "id"}
            examples.append({
                "id": row["id"],
                "prompt": prompt if chat else plain_conversation(prompt, row["id"], source),
                "reference": reference,
                "row": json.dumps(shown, default=str),
            })  # fmt: skip
    skipped.check()
    return datasets.Dataset.from_list(examples, on_mixed_types="use_json")


def prompt_shape(columns: list[str], source: Dataset) -> Shape:
    """The columns that make a prompt: its own, and those of a context, a system message and earlier turns."""
    others = [name for name in columns if name not in ("id", source.completion)]
    shape = with_extras(Shape("prompt-completion", prompt=source.prompt), others, source)
    return replace(shape, tools=None, options=None)  # trl's trainer gives the template none of them


def prompt_notes(columns: list[str], source: Dataset) -> list[str]:
    """Notes on the columns that are shown with the prompt, and on those that only the reward gets."""
    shape = prompt_shape(columns, source)
    shown = sorted(shape.used() - {source.prompt})
    rest = [name for name in columns if name not in (*shape.used(), "id", source.completion)]
    notes = [f"Shown with the prompt: {', '.join(shown)}."] if shown else []
    return notes + ([f"Columns that only the reward gets: {', '.join(rest)}."] if rest else [])
