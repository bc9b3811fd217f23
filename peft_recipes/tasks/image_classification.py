"""image-classification: assign an image to one of the recipe's classes; a small CNN as base is pretrained first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_recipes.data import formats, images
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.shapes import unused_note
from peft_recipes.errors import RecipeError
from peft_recipes.guards import checks
from peft_recipes.models import bases
from peft_recipes.models.image_sizes import channels, height_and_width
from peft_recipes.recipe.dataset import Dataset
from peft_recipes.tasks.classification import Classification
from peft_recipes.tasks.pretraining import trained_base

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn

_KEPT_BYTES = 2**30  # pixels of a split are kept in memory after their first use up to this much


class PixelDataset(torch.utils.data.Dataset):
    """Images as the model's pixel values, computed on first use and kept while they are small."""

    def __init__(self, rows: datasets.Dataset, source: Dataset, config: Any, processor: Any):
        self.rows, self.source, self.config, self.processor = rows, source, config, processor
        self.labels = rows["label"]
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels = self._kept.get(i)
        if pixels is None:
            row = self.rows[i]
            image = images.shift(row["image"], row["id"], self.source.transform)
            pixels = images.pixels(image, self.config, self.processor)
            if pixels.nbytes * len(self) <= _KEPT_BYTES:
                self._kept[i] = pixels
        return {"pixel_values": pixels, "labels": self.labels[i]}


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """pixel_values [batch, channels, height, width] and labels [batch]."""
    return {
        "pixel_values": torch.from_numpy(np.stack([e["pixel_values"] for e in examples])),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


class ImageClassification(Classification):
    """Images through the model's own image processor, or scaled to 0..1; shifted by the recipe's transform."""

    def prepare(self) -> Prepared:
        source = self.recipe.dataset
        raw = self.raw_splits()
        labels = formats.class_labels(raw, source)
        splits = {name: formats.classification_rows(rows, source, "image", labels) for name, rows in raw.items()}
        splits, duplicates = self.without_duplicates(splits, ["image"])
        if self.guards("classes"):
            checks.more_than_one_class(splits["train"], labels, source.path)
        config, processor = bases.load_config(self.recipe), self._processor()
        pixels = {name: PixelDataset(rows, self._source(name), config, processor) for name, rows in splits.items()}
        ids = {name: list(rows["id"]) for name, rows in splits.items()}
        unused = unused_note(raw["train"].column_names, {source.image, source.label})
        notes = [*duplicates, *unused, *checks.missing_classes(splits, labels), *self.notes]
        samples = self._samples(splits.get("test"), labels)
        return Prepared(pixels, ids, formats.fingerprint(splits), processor, labels, notes, samples)

    def _source(self, split: str) -> Dataset:
        if split == "pretrain":
            return Dataset(**{**vars(self.recipe.dataset), "transform": None})  # the base is pretrained on plain images
        return self.source_of(split)

    def _processor(self) -> Any:
        side = self.recipe.dataset.image_size
        if self.recipe.model == bases.SMALL_CNN:
            if side:
                raise RecipeError("dataset.image_size: no effect on small-cnn, whose images are 28 x 28. Leave it out.")
            return None
        from transformers import AutoImageProcessor

        with bases.hub_errors("image processor of model", self.recipe.model):
            processor = AutoImageProcessor.from_pretrained(bases.location(self.recipe.model), use_fast=True)
        if side:
            images.resize_to(processor, side)
        return processor

    def use_base(self, base: nn.Module, prepared: Prepared, quantise: str | None = None) -> None:
        """Raise RecipeError if the base can't take images of the recipe's size."""
        side = self.recipe.dataset.image_size
        if side is None or base.device.type == "meta":
            return
        inputs = self.model_inputs(prepared.splits["train"][0])
        try:
            with torch.no_grad():
                base.eval()(**{name: values.to(base.device) for name, values in inputs.items()})
        except (ValueError, RuntimeError, AssertionError) as error:
            raise RecipeError(
                f"dataset.image_size: model '{self.recipe.model}' can't take images of {side} x {side} pixels "
                f"({' '.join(str(error).split()).rstrip('.')}). Leave it out for the model's own size."
            ) from error

    def _samples(self, rows: datasets.Dataset | None, labels: list[str]) -> list[dict[str, str]] | None:
        """One image of each class, before and after the recipe's shift, for the report."""
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
        return trained_base(self, prepared) if self.recipe.model == bases.SMALL_CNN else None

    def collator(self, prepared: Prepared) -> Any:
        return collate

    def largest_batch(self, model: Any, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        if prepared is not None:
            shape = prepared.splits["train"][0]["pixel_values"].shape
        else:
            side = self.recipe.dataset.image_size
            shape = (channels(model.config), *((side, side) if side else height_and_width(model.config)))
        pixels = torch.zeros(size, *shape)
        return {"pixel_values": pixels, "labels": torch.zeros(size, dtype=torch.long)}

    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"pixel_values": collate([example])["pixel_values"]}
