"""language-modeling: plain text, the loss on every token."""

from __future__ import annotations

from typing import Any

from peft_recipes.data import formats
from peft_recipes.data.rendering import text_ids
from peft_recipes.data.shapes import unused_note
from peft_recipes.data.sources import missing_column
from peft_recipes.errors import RecipeError
from peft_recipes.tasks.causal import Causal


class LanguageModeling(Causal):
    """The texts of one column, each followed by an end-of-text token."""

    def text_rows(self, raw: Any, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
        texts, empty = {}, 0
        for name, rows in raw.items():
            source = self.source_of(name)
            if source.text not in rows.column_names:
                raise RecipeError(missing_column(source.text, "text", rows.column_names, source.path))
            kept = rows.select([i for i, text in enumerate(rows[source.text]) if text is not None and text != ""])
            formats.check_text(kept, source.text, source.path)
            kept = kept.select([i for i, text in enumerate(kept[source.text]) if text.strip()])
            empty += len(rows) - len(kept)
            renames = {source.text: "text"} if source.text != "text" else {}
            texts[name] = kept.select_columns(["id", source.text]).rename_columns(renames)
        notes = unused_note(raw["train"].column_names, {self.source.text})
        return texts, [*notes, f"{empty} empty texts were left out."] if empty else notes

    def tokenise(self, row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
        ids = text_ids(row["text"], tokenizer)
        return {"input_ids": ids, "labels": list(ids)}
