"""image-classification: a picture into one of the recipe's classes; a base that does not exist is trained first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_recipes.data import columns, images
from peft_recipes.data.prepared import Prepared
from peft_recipes.guards import checks
from peft_recipes.models import bases
from peft_recipes.recipe.dataset import Dataset
from peft_recipes.tasks.classification import Classification
from peft_recipes.tasks.pretraining import trained_base

if TYPE_CHECKING:
    import datasets

_KEPT_BYTES = 2**30  # pixels are kept in memory after their first use up to this much


class PixelRows(torch.utils.data.Dataset):
    """Rows of images as the model's pixels, made on first use and kept while they are small."""

    def __init__(self, rows: datasets.Dataset, source: Dataset, config: Any, processor: Any):
        self.rows, self.source, self.config, self.processor = rows, source, config, processor
        self.labels = rows["label"]
        self._made: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels = self._made.get(i)
        if pixels is None:
            row = self.rows[i]
            picture = images.shift(row["image"], row["id"], self.source.transform)
            pixels = images.pixels(picture, self.config, self.processor)
            if pixels.nbytes * len(self) <= _KEPT_BYTES:
                self._made[i] = pixels
        return {"pixel_values": pixels, "labels": self.labels[i]}


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """pixel_values [batch, channels, height, width] and labels [batch]."""
    return {
        "pixel_values": torch.from_numpy(np.stack([e["pixel_values"] for e in examples])),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


class ImageClassification(Classification):
    """Pictures by the model's own image processor, or scaled to 0..1; shifted as the recipe's transform says."""

    def prepare(self) -> Prepared:
        source = self.recipe.dataset
        raw = self.raw_splits()
        labels = columns.class_labels(raw, source)
        splits = {name: columns.classification_rows(rows, source, "image", labels) for name, rows in raw.items()}
        if self.guards("classes"):
            checks.more_than_one_class(splits["train"], labels, source.path)
        config, processor = bases.load_config(self.recipe), self._processor()
        pixels = {name: PixelRows(rows, self._source(name), config, processor) for name, rows in splits.items()}
        ids = {name: list(rows["id"]) for name, rows in splits.items()}
        fingerprint = self._fingerprint(splits)
        notes = [*checks.missing_classes(splits, labels), *self.left_out]
        samples = self._samples(splits.get("test"), labels)
        return Prepared(pixels, ids, fingerprint, processor, labels, notes, samples)

    def _source(self, split: str) -> Dataset:
        if split == "pretrain":
            return Dataset(**{**vars(self.recipe.dataset), "transform": None})  # the base learns plain pictures
        return self.source_of(split)

    def _processor(self) -> Any:
        if self.recipe.model == bases.SMALL_CNN:
            return None
        from transformers import AutoImageProcessor

        with bases.hub_errors("image processor of model", self.recipe.model):
            return AutoImageProcessor.from_pretrained(bases.location(self.recipe.model), use_fast=True)

    def _samples(self, rows: datasets.Dataset | None, labels: list[str]) -> list[dict[str, str]] | None:
        """One picture a class, before and after the recipe's shift, for the report."""
        if rows is None or not self.recipe.dataset.transform:
            return None
        first = {label: i for i, label in reversed(list(enumerate(rows["label"])))}
        chosen = [rows[first[label]] for label in sorted(first)][:10]
        return [
            {
                "label": labels[row["label"]],
                "before": images.as_base64(row["image"]),
                "after": images.as_base64(images.shift(row["image"], row["id"], self.recipe.dataset.transform)),
            }
            for row in chosen
        ]

    def base_folder(self, prepared: Prepared) -> Path | None:
        if self.recipe.model != bases.SMALL_CNN:
            return None
        return trained_base(self, prepared)

    def collator(self, prepared: Prepared) -> Any:
        return collate

    def largest_batch(self, model: Any, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        side = model.config.image_size
        high, wide = side if isinstance(side, (list, tuple)) else (side, side)
        pixels = torch.zeros(size, model.config.num_channels, high, wide)
        return {"pixel_values": pixels, "labels": torch.zeros(size, dtype=torch.long)}

    def inputs(self, prepared: Prepared, count: int) -> list[dict[str, torch.Tensor]]:
        rows = prepared.splits["test"]
        return [{"pixel_values": collate([rows[i]])["pixel_values"]} for i in range(min(count, len(rows)))]
