"""Prompts to answer, with references where there are some, from the formats of supervised fine-tuning."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from peft_recipes.data.formats import as_text, plain_conversation
from peft_recipes.data.skipped import NO_PROMPT, SkippedRows
from peft_recipes.data.sources import missing_column
from peft_recipes.data.supervised import read_side
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
    chat template, so that text becomes messages. Raises RecipeError with the row: a missing column, another type.
    """
    import datasets

    keys = ("prompt", "completion") if references or source.completion in rows.column_names else ("prompt",)
    for key in keys:
        if getattr(source, key) not in rows.column_names:
            raise RecipeError(missing_column(getattr(source, key), key, rows.column_names, source.path))
    examples = []
    for row in rows:
        values = {key: read_side(row, getattr(source, key), "user", source) for key in keys}
        prompt, reference = values["prompt"], as_text(values.get("completion", []))
        if not as_text(prompt).strip():
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
