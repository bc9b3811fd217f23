"""token-classification: tag each word of a sentence, such as named entities (CoNLL's tags, or spans of characters).

A word is labelled and scored at its first piece; its other pieces and the special tokens have the label -100.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from peft_recipes.data import formats, mixing, tags, words
from peft_recipes.data.columns import column_values
from peft_recipes.data.prepared import Prepared
from peft_recipes.errors import RecipeError
from peft_recipes.models import bases
from peft_recipes.models.meta import label_options
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.scoring import entities
from peft_recipes.tasks import metrics, reading
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.classification import trains_head_alone
from peft_recipes.tasks.token_trainer import IGNORED, TokenClassificationTrainer, TokenCollator

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn


class TokenClassification(Task):
    """A new head on a pretrained text model that gives each word a tag; sentences are truncated at max_length."""

    def prepare(self) -> Prepared:
        _, splits, found = reading.read(self, self._tagged)
        labels = mixing.agreed([labels for labels, _ in found], [one.path for one in self.recipe.sources], "tags")
        notes = reading.named_notes(self, [notes for _, notes in found])
        splits, duplicates = self.without_duplicates(splits, ["words"])
        self._check_tags(splits["train"], labels)
        tokenizer = bases.load_tokenizer(self.recipe)
        words.check_fast(tokenizer, self.recipe.model)
        notes += [*duplicates, *self.notes]
        encoded, kept, whole = {}, {}, {}
        for name, rows in splits.items():
            kept[name], encoded[name], whole[name], more = self._encoded(rows, tokenizer, name)
            notes += more
        ids = {name: list(column_values(rows, "id")) for name, rows in kept.items()}
        return Prepared(encoded, ids, formats.fingerprint(splits), tokenizer, labels, notes, whole=whole)

    def _tagged(self, raw: dict[str, datasets.Dataset]) -> tuple[dict[str, datasets.Dataset], Any]:
        splits, labels, notes = tags.tagged_splits(raw, self.source)
        return splits, (labels, notes)

    def _check_tags(self, train: datasets.Dataset, labels: list[str]) -> None:
        """Raise RecipeError where the metric can't be computed, or where there is one class only to learn."""
        path, metric = self.recipe.data_name, self.recipe.metric
        if tags.entity_tags(labels) is None and metric in entities.METRICS:
            raise RecipeError(
                f"dataset '{path}': its tags ({', '.join(labels[:5])}, ...) mark no entities (B-PER, I-PER, O), so "
                f"there is no {metric}. Compare by the share of right tags: --set metric=token_accuracy."
            )
        used = {tag for row in train["tags"] for tag in row}
        if self.guards("classes") and len(used) < 2:
            raise RecipeError(
                f"dataset '{path}': every word of the {len(train)} training sentences has the tag "
                f"'{labels[used.pop()]}'. Set other sizes or another dataset.seed."
            )

    def _encoded(
        self, rows: datasets.Dataset, tokenizer: Any, split: str
    ) -> tuple[datasets.Dataset, datasets.Dataset, dict[str, list[int]], list[str]]:
        """The rows that keep a labelled word; the same encoded (input_ids, attention_mask, labels, words).

        Also the tokens and words of all rows before truncation, and notes.
        """
        import datasets

        sentences = words.encode(tokenizer, rows["words"], rows["spaces"], self.recipe.max_length)
        keep = [i for i, sentence in enumerate(sentences) if any(p is not None for p in sentence.first)]
        if not keep:
            raise RecipeError(
                f"No {split} sentence has a word within {self.recipe.max_length} tokens. Set a larger max_length."
            )
        examples = [_example(sentences[i], rows[i]) for i in keep]
        whole = {
            "tokens": words.whole_lengths(tokenizer, rows, sentences),
            "labelled": [len(s.first) for s in sentences],
        }
        notes = self._left_out(sentences, split, len(keep))
        return rows.select(keep), datasets.Dataset.from_list(examples), whole, notes

    def _left_out(self, sentences: list[words.Encoded], split: str, kept: int) -> list[str]:
        """Notes on words and sentences that are neither trained on nor scored."""
        total, cut = (sum(map(of, sentences)) for of in (lambda s: len(s.first), lambda s: s.cut))
        removed = sum(position is None for sentence in sentences for position in sentence.first) - cut
        notes = []
        if cut:
            longer = sum(sentence.cut > 0 for sentence in sentences)
            notes.append(f"{cut} of {total} {split} words are behind max_length {self.recipe.max_length} (in {longer} "
                         "sentences): they are neither trained on nor scored.")  # fmt: skip
        if removed:
            notes.append(f"{removed} of {total} {split} words have no token: they are neither trained on nor scored.")
        if kept < len(sentences):
            notes.append(f"{len(sentences) - kept} {split} sentences without a token were left out.")
        return notes

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: TrainingArguments, callbacks: list[Any]):
        return TokenClassificationTrainer(
            model=model,
            args=arguments,
            train_dataset=prepared.splits["train"],
            eval_dataset=prepared.splits["validation"],
            data_collator=TokenCollator(prepared.processor),
            compute_metrics=partial(_metrics, labels=prepared.labels),
            callbacks=callbacks,
            frozen_backbone=trains_head_alone(model),
        )

    def base_options(self, prepared: Prepared | None) -> dict[str, Any]:
        names = prepared.labels if prepared else None
        return label_options(names or self._planned_labels())

    def _planned_labels(self) -> list[str] | None:
        """The tags of a recipe whose data is not loaded; of the types of spans their B- and I- tags."""
        labels = self.recipe.dataset.labels
        types = labels and not tags.are_tags(labels) and self.recipe.metric in entities.METRICS
        return tags.span_tags(labels) if types else labels

    def evaluate(self, trainer: Trainer, prepared: Prepared, split: str) -> Evaluation:
        rows, lengths = prepared.splits[split], self.lengths(prepared, split)
        order = np.argsort([-n for n in lengths], kind="stable")
        output = trainer.predict(rows.select(order))
        results, labels = np.empty_like(output.predictions), np.empty_like(output.label_ids)
        results[order], labels[order] = output.predictions, output.label_ids
        prediction = EvalPrediction(predictions=results, label_ids=labels)
        references, predicted, losses = _by_sentence(prediction, prepared.labels)
        counts = [len(sentence) for sentence in losses]
        correct = [sum(map(str.__eq__, *pair)) for pair in zip(references, predicted, strict=True)]
        columns = {
            "id": prepared.ids[split],
            "words": list(rows["words"]),
            "label": references,
            "prediction": predicted,
            "loss": [float(sentence.mean()) for sentence in losses],
            "tokens": counts,
            "correct_tokens": correct,
            "token_accuracy": [right / count for right, count in zip(correct, counts, strict=True)],
        }
        tagged = _as_entities(references, predicted, prepared.labels)
        return Evaluation(
            metrics=_metrics(prediction, prepared.labels),
            predictions=columns | (entities.entity_pseudo_values(*tagged) if tagged else {}),
            per_class=entities.per_type(*tagged) if tagged else _per_tag(references, predicted, prepared.labels),
        )

    def largest_batch(self, model: Any, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        longest = max(self.lengths(prepared, "train")) if prepared else self.recipe.max_length
        ids = torch.ones(size, longest, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros_like(ids)}

    def lengths(self, prepared: Prepared, split: str) -> list[int]:
        return [len(tokens) for tokens in prepared.splits[split]["input_ids"]]

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([example[key]]) for key in ("input_ids", "attention_mask")}


def _example(sentence: words.Encoded, row: dict[str, Any]) -> dict[str, Any]:
    """A sentence as the trainer takes it, with its labelled words."""
    labels = [IGNORED] * len(sentence.input_ids)
    labelled = [(position, i) for i, position in enumerate(sentence.first) if position is not None]
    for position, i in labelled:
        labels[position] = row["tags"][i]
    return {
        "input_ids": sentence.input_ids,
        "attention_mask": [1] * len(labels),
        "labels": labels,
        "words": [row["words"][i] for _, i in labelled],
    }


def _by_sentence(
    prediction: EvalPrediction, labels: list[str]
) -> tuple[list[list[str]], list[list[str]], list[np.ndarray]]:
    """References, predictions and losses of the labelled words of each sentence.

    prediction: predictions [sentences, length, 2] (tag, loss) and label_ids [sentences, length].
    """
    references, predicted, losses = [], [], []
    for result, label_ids in zip(prediction.predictions, prediction.label_ids, strict=True):
        labelled = label_ids != IGNORED
        references.append([labels[i] for i in label_ids[labelled]])
        predicted.append([labels[i] for i in result[labelled, 0].astype(int)])
        losses.append(result[labelled, 1].astype(np.float64))
    return references, predicted, losses


def _metrics(prediction: EvalPrediction, labels: list[str]) -> dict[str, float]:
    """The entity metrics, token_accuracy and the loss in nats, a mean over all labelled words."""
    references, predicted, losses = _by_sentence(prediction, labels)
    right = [a == b for pair in zip(references, predicted, strict=True) for a, b in zip(*pair, strict=True)]
    tagged = _as_entities(references, predicted, labels)
    return {
        **(entities.entity_metrics(*tagged) if tagged else {}),
        "token_accuracy": float(np.mean(right)),
        "loss": float(np.concatenate(losses).mean()),
    }


def _as_entities(
    references: list[list[str]], predicted: list[list[str]], labels: list[str]
) -> tuple[list[list[str]], list[list[str]]] | None:
    """References and predictions in the tags that seqeval reads; None for tags that mark no entities."""
    names = tags.entity_tags(labels)
    if names is None:
        return None
    by_label = dict(zip(labels, names, strict=True))
    read = [[[by_label[tag] for tag in row] for row in rows] for rows in (references, predicted)]
    return read[0], read[1]


def _per_tag(references: list[list[str]], predicted: list[list[str]], labels: list[str]) -> list[dict[str, Any]]:
    """The report of each tag, for tags that mark no entities."""
    numbers = {label: i for i, label in enumerate(labels)}
    flat = [np.array([numbers[tag] for row in rows for tag in row]) for rows in (predicted, references)]
    return metrics.per_class(flat[0], flat[1], labels)
