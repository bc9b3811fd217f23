"""text-classification: assign a text to one of the recipe's classes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DataCollatorWithPadding

from peft_recipes.data import formats
from peft_recipes.data.prepared import Prepared
from peft_recipes.guards import checks
from peft_recipes.models import bases
from peft_recipes.tasks.classification import Classification


class TextClassification(Classification):
    """A new head on a pretrained text model; texts are truncated at max_length and padded to their batch."""

    def prepare(self) -> Prepared:
        source, max_length = self.recipe.dataset, self.recipe.max_length
        raw = self.raw_splits()
        labels = formats.class_labels(raw, source)
        splits = {name: formats.classification_rows(rows, source, "text", labels) for name, rows in raw.items()}
        splits, notes = self.without_duplicates(splits, ["text"])
        if self.guards("classes"):
            checks.more_than_one_class(splits["train"], labels, source.path)
        tokenizer = bases.load_tokenizer(self.recipe)
        notes += [*checks.missing_classes(splits, labels), *self.notes]
        tokenised = {}
        for name, rows in splits.items():
            tokens = tokenizer(list(rows["text"]), truncation=True, max_length=max_length)["input_ids"]
            kept = rows.select_columns(["label"]).rename_columns({"label": "labels"})
            masks = [[1] * len(t) for t in tokens]
            tokenised[name] = kept.add_column("input_ids", tokens).add_column("attention_mask", masks)
            if name == "train" and (cut := sum(len(t) == max_length for t in tokens)):
                notes.append(f"{cut} of {len(rows)} training texts reach max_length {max_length}.")
        ids = {name: list(rows["id"]) for name, rows in splits.items()}
        return Prepared(tokenised, ids, formats.fingerprint(splits), tokenizer, labels, notes)

    def collator(self, prepared: Prepared) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(prepared.processor)

    def largest_batch(self, model: Any, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        model.config.pad_token_id = model.config.pad_token_id or 0  # `load_base` sets it from the tokenizer
        longest = max(self.lengths(prepared, "train")) if prepared else self.recipe.max_length
        ids = torch.ones(size, longest, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(size, dtype=torch.long)}

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return [len(tokens) for tokens in prepared.splits[split]["input_ids"]]

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([example[key]]) for key in ("input_ids", "attention_mask")}
