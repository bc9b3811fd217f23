"""text-classification: a class, several classes or a number for a text or a pair of texts."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from transformers import DataCollatorWithPadding

from peft_recipes.data import formats
from peft_recipes.data.columns import column_values
from peft_recipes.data.encoding import check_ends, encode, separates_pairs, whole_lengths
from peft_recipes.data.labels import Labels, labelled_texts, same_labels
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.shapes import unused_note
from peft_recipes.errors import RecipeError
from peft_recipes.guards import checks
from peft_recipes.models import bases
from peft_recipes.recipe.dataset import CLASSES
from peft_recipes.recipe.mixture import dataset_changes
from peft_recipes.recipe.options import PROBLEM_METRICS
from peft_recipes.tasks import reading, streamed
from peft_recipes.tasks.classification import Classification
from peft_recipes.tasks.problem_types import PROBLEM_TYPES


class TextClassification(Classification):
    """A new head on a pretrained text model; texts are truncated at max_length and padded to their batch."""

    def prepare(self) -> Prepared:
        source, max_length = self.recipe.dataset, self.recipe.max_length
        raw, splits, found = reading.read(self, self._labelled)
        labels = same_labels(found, [one.path for one in self.recipe.sources])
        self._check_options(labels.problem_type)
        splits, notes = self.without_duplicates(splits, ["text", "text_pair"])
        if self.guards("classes"):
            checks.labels_differ(splits["train"], labels.names, self.recipe.data_name)
        tokenizer, config = bases.load_tokenizer(self.recipe), bases.load_config(self.recipe)
        notes += reading.named_notes(self, [one.notes for one in found])
        notes += [*checks.missing_classes(splits, labels.names), *self.notes, *self.skipped_notes()]
        problem = PROBLEM_TYPES[labels.problem_type]
        tokenised, whole = {}, {}
        for name, rows in splits.items():
            pairs = list(column_values(rows, "text_pair")) if "text_pair" in rows.column_names else None
            columns = encode(tokenizer, list(column_values(rows, "text")), pairs, max_length, config)
            check_ends(columns["input_ids"], config, f"dataset '{source.path}', {name} split")
            whole[name] = {"tokens": whole_lengths(tokenizer, rows, columns["input_ids"], max_length), "labelled": []}
            targets = problem.targets(list(column_values(rows, "label")), len(labels.names or ()))
            tokenised[name] = datasets.Dataset.from_dict({"labels": targets, **columns})
            if name == "train" and (cut := sum(len(ids) == max_length for ids in columns["input_ids"])):
                notes.append(f"{cut} of {len(rows)} training texts reach max_length {max_length}.")
        if len(source.text_columns) > 1 and not separates_pairs(tokenizer):
            notes.append(f"The tokenizer of {self.recipe.model} puts nothing between the two texts of a pair.")
        ids = {name: list(column_values(rows, "id")) for name, rows in splits.items()}
        fingerprint = formats.fingerprint(splits)
        kind = labels.problem_type
        prepared = Prepared(tokenised, ids, fingerprint, tokenizer, labels.names, notes, problem_type=kind, whole=whole)

        def convert(chunk: datasets.Dataset) -> Any:
            return labelled_texts({"train": chunk}, self.source)[0]["train"], encode_chunk

        def encode_chunk(rows: datasets.Dataset) -> datasets.Dataset:
            pairs = list(column_values(rows, "text_pair")) if "text_pair" in rows.column_names else None
            columns = encode(tokenizer, list(column_values(rows, "text")), pairs, max_length, config)
            targets = problem.targets(list(column_values(rows, "label")), len(labels.names or ()))
            return datasets.Dataset.from_dict({"id": list(column_values(rows, "id")), "labels": targets, **columns})

        self.settled = {"labels": labels.names, "problem_type": kind}
        return streamed.attach(self, prepared, raw, splits, ["text", "text_pair"], convert)

    def _labelled(self, raw: dict[str, datasets.Dataset]) -> tuple[dict[str, datasets.Dataset], Labels]:
        source = self.source
        splits, labels = labelled_texts(raw, source, self.skipped_of)
        labels.notes.extend(unused_note(raw["train"].column_names, {*source.text_columns, source.label}))
        return splits, labels

    def _check_options(self, problem_type: str) -> None:
        """Raise RecipeError for options that don't fit the labels: a metric, a best model's metric, smoothing."""
        recipe, valid, problems = self.recipe, PROBLEM_METRICS[problem_type], []
        what = f"the labels of dataset '{recipe.data_name}' make it a {problem_type} (dataset.problem_type)"
        options = ", ".join(valid)
        if recipe.metric not in valid:
            problems.append(f"metric: {what}, which '{recipe.metric}' can't measure. Add --set metric={valid[0]} "
                            f"(possible: {options}).")  # fmt: skip
        best = (recipe.training.get("metric_for_best_model") or "loss").removeprefix("eval_")
        if best not in valid:
            problems.append(f"training.metric_for_best_model: {what}, which '{best}' can't measure. "
                            f"Possible: {options}.")  # fmt: skip
        if problem_type != CLASSES and recipe.training.get("label_smoothing_factor"):
            problems.append(f"training.label_smoothing_factor: {what}, and only one class per text can be smoothed.")
        if problems:
            raise RecipeError(*problems)

    def found(self, prepared: Prepared) -> dict[str, Any]:
        """The problem type of the data, unless it is one class per text, the default."""
        settled = prepared.problem_type not in (None, CLASSES, self.recipe.dataset.problem_type)
        return dataset_changes(self.recipe, {"problem_type": prepared.problem_type}) if settled else {}

    def collator(self, prepared: Prepared) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(prepared.processor)

    def largest_batch(self, model: Any, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        model.config.pad_token_id = model.config.pad_token_id or 0  # `load_base` sets it from the tokenizer
        longest = max(self.lengths(prepared, "train")) if prepared else self.recipe.max_length
        ids = torch.ones(size, longest, dtype=torch.long)
        labels = self.problem(prepared).blank_labels(size, model.config.num_labels)
        return {"input_ids": ids, "attention_mask": ids, "labels": labels}

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return [len(tokens) for tokens in prepared.splits[split]["input_ids"]]

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([values]) for key, values in example.items() if key != "labels"}
