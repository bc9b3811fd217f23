"""text-classification: a text into one of the recipe's classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DataCollatorWithPadding

from peft_recipes.data import columns
from peft_recipes.data.prepared import Prepared
from peft_recipes.guards import checks
from peft_recipes.models import bases
from peft_recipes.tasks.classification import Classification

if TYPE_CHECKING:
    import torch


class TextClassification(Classification):
    """A new head on a pretrained text model; texts are cut at the recipe's max_length and padded to their batch."""

    def prepare(self) -> Prepared:
        source = self.recipe.dataset
        raw = self.raw_splits()
        labels = columns.class_labels(raw, source)
        splits = {name: columns.classification_rows(rows, source, "text", labels) for name, rows in raw.items()}
        splits, dropped = self.without_duplicates(splits, ["text"])
        if self.guards("classes"):
            checks.more_than_one_class(splits["train"], labels, source.path)
        tokenizer = bases.load_tokenizer(self.recipe)
        notes = [f"{dropped} texts that stand in a later split too were taken out."] if dropped else []
        notes += [*checks.missing_classes(splits, labels), *self.left_out]
        tokenised, cut = {}, 0
        for name, rows in splits.items():
            tokens = tokenizer(list(rows["text"]), truncation=True, max_length=self.recipe.max_length)["input_ids"]
            cut += sum(len(t) == self.recipe.max_length for t in tokens) if name == "train" else 0
            kept = rows.select_columns(["label"]).rename_columns({"label": "labels"})
            masks = [[1] * len(t) for t in tokens]
            tokenised[name] = kept.add_column("input_ids", tokens).add_column("attention_mask", masks)
        if cut:
            notes.append(f"{cut} of {len(splits['train'])} training texts reach max_length {self.recipe.max_length}.")
        ids = {name: list(rows["id"]) for name, rows in splits.items()}
        return Prepared(tokenised, ids, self._fingerprint(splits), tokenizer, labels, notes)

    def load_base(self, prepared: Prepared, quantise: str | None = None) -> tuple[Any, list[str]]:
        model, new = super().load_base(prepared, quantise)
        bases.set_pad_token(model, prepared.processor)
        return model, new

    def collator(self, prepared: Prepared) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(prepared.processor)

    def largest_batch(self, model: Any, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        import torch

        model.config.pad_token_id = model.config.pad_token_id or 0  # as `load_base` sets it from the tokenizer
        longest = max(self.lengths(prepared, "train")) if prepared else self.recipe.max_length
        ids = torch.ones(size, longest, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(size, dtype=torch.long)}

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return [len(tokens) for tokens in prepared.splits[split]["input_ids"]]

    def inputs(self, prepared: Prepared, count: int) -> list[dict[str, torch.Tensor]]:
        import torch

        rows = prepared.splits["test"].select(range(min(count, len(prepared.splits["test"]))))
        return [{"input_ids": torch.tensor([row["input_ids"]]), "attention_mask": torch.tensor([row["attention_mask"]])}
                for row in rows]  # fmt: skip
