"""Cached features for a linear probe: the frozen backbone runs once over the data instead of once per epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, SequenceClassifierOutput

from peft_recipes.data.packing import COUNTS, Counts

if TYPE_CHECKING:
    import torch.nn as nn
    from transformers import Trainer

FEATURES = "features"
IN_MEMORY_BYTES = 2**30  # features beyond this are memory-mapped from a temporary file
_SAME = 1e-5  # of the logits' size

Pooling = Callable[[Any, dict[str, Any]], torch.Tensor]
"""Selects the features [batch, width] that a classification head reads from (backbone output, batch)."""


def _last_token(output: Any, batch: dict[str, Any]) -> torch.Tensor:
    last = batch["attention_mask"].sum(1) - 1
    return output[0][torch.arange(len(last), device=last.device), last]


# Tried in this order; which one a model uses is found by comparing logits.
_POOLINGS: tuple[Pooling, ...] = (
    lambda output, _: output.pooler_output,
    lambda output, _: output[0][:, 0],
    _last_token,
)


class Backbone:
    """The frozen part of a classification model, which can be run alone, or replaced by cached features.

    It is the base model of a transformers model, or the method `features` of a model without one (the small CNN).
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._is_method = model.base_model is model
        self._owner: Any = model if self._is_method else model.base_model
        self._call = "features" if self._is_method else "forward"

    @contextlib.contextmanager
    def _replaced(self, replacement: Callable[..., Any]) -> Iterator[None]:
        """Within the block, the model calls `replacement` instead of its backbone."""
        setattr(self._owner, self._call, replacement)
        try:
            yield
        finally:
            delattr(self._owner, self._call)  # the class's own method comes back

    def output(self, batch: dict[str, Any]) -> Any:
        """Run the backbone alone."""
        return self.model.features(**batch) if self._is_method else self._owner(**batch)

    def output_and_logits(self, batch: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """Run the complete model; return its backbone's output and its logits."""
        outputs: list[Any] = []
        backbone = getattr(self._owner, self._call)

        def recording(*args: Any, **kwargs: Any) -> Any:
            outputs.append(backbone(*args, **kwargs))
            return outputs[-1]

        with self._replaced(recording):
            logits = self.model(**batch).logits
        return outputs[0], logits

    def logits_of(self, features: torch.Tensor) -> torch.Tensor:
        """The head's logits [batch, classes] of features [batch, width]."""
        output: Any = features
        if not self._is_method:
            output = BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=features.unsqueeze(1), pooler_output=features
            )
        with self._replaced(lambda *_, **__: output):
            return self.model(**self._dummy_batch(features)).logits

    def _dummy_batch(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """An input with one token that is no padding: the model reads its shape and mask, not its content."""
        if self.model.main_input_name != "input_ids":
            return {self.model.main_input_name: features}
        pad = self.model.config.pad_token_id
        ids = torch.full((len(features), 1), 1 if pad != 1 else 0, device=features.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def pooling(self, batch: dict[str, Any]) -> Pooling | None:
        """Find what the head reads of the backbone's output; None where nothing reproduces the logits."""
        if not hasattr(self._owner, self._call):
            return None
        output, logits = self.output_and_logits(batch)
        if float((logits - logits[0]).abs().max()) == 0:
            return None  # a head that gives all examples the same logits can't show what it reads
        size = max(1.0, float(logits.abs().max()))
        for pooling in (lambda output, _: output,) if self._is_method else _POOLINGS:
            try:
                features = pooling(output, batch)
                found = self.logits_of(features) if features.dim() == 2 else logits.new_empty(0)
            except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError):
                continue
            if found.shape == logits.shape and float((found - logits).abs().max()) <= _SAME * size:
                return pooling
        return None


class FeatureClassifier(torch.nn.Module):
    """A classification model whose input is cached features; its head's weights are the model's own."""

    def __init__(self, model: nn.Module, backbone: Backbone):
        super().__init__()
        self.model, self.backbone = model, backbone
        self.config = model.config

    def forward(self, features: torch.Tensor) -> SequenceClassifierOutput:
        """Logits [batch, classes] of features [batch, width]."""
        return SequenceClassifierOutput(logits=self.backbone.logits_of(features))


class FeatureDataset(torch.utils.data.Dataset):
    """The features of a split, in its order: an array in memory, or a memory-mapped file."""

    def __init__(self, features: np.ndarray, labels: list[Any], lengths: list[int] | None):
        self.features, self.labels, self.lengths = features, labels, lengths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = self.lengths[i] if self.lengths else 0
        return {FEATURES: self.features[i], "labels": self.labels[i], "tokens": tokens}


def collate_features(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """features [batch, width] and labels [batch] or [batch, classes]; each example counts as one computed position."""
    return {
        FEATURES: torch.from_numpy(np.stack([example[FEATURES] for example in examples])),
        "labels": torch.tensor([example["labels"] for example in examples]),
        COUNTS: Counts(sum(example["tokens"] for example in examples), len(examples), 0, len(examples)),
    }


@torch.no_grad()
def compute_features(
    trainer: Trainer, backbone: Backbone, pooling: Pooling, rows: Any, lengths: list[int] | None, file: Path
) -> FeatureDataset:
    """Compute the features of a split with the trainer's collator, the longest examples first.

    Beyond IN_MEMORY_BYTES they are written to `file`. Each rank computes a share and gets the features of all.
    """
    order = np.argsort([-n for n in lengths], kind="stable") if lengths else np.arange(len(rows))
    features: np.ndarray | None = None
    labels: np.ndarray | None = None
    done = 0
    trainer.model.eval()
    loader = torch.utils.data.DataLoader(
        rows.select(order) if lengths else rows,
        batch_size=trainer.args.eval_batch_size,
        collate_fn=trainer.data_collator,
    )
    for inputs in trainer.accelerator.prepare_data_loader(loader):
        batch = trainer._prepare_inputs(inputs)
        batch_labels = batch.pop("labels")
        with trainer.compute_loss_context_manager():
            computed = pooling(backbone.output(batch), batch).float()
        gathered = trainer.accelerator.gather_for_metrics((computed, batch_labels))
        batch_features, batch_labels = (tensor.cpu().numpy() for tensor in gathered)
        if features is None:
            shape = (len(rows), batch_features.shape[1])
            in_memory = shape[0] * shape[1] * 4 <= IN_MEMORY_BYTES
            create = np.empty if in_memory else partial(np.lib.format.open_memmap, file, "w+")
            features = create(shape=shape, dtype=np.float32)
            labels = np.empty((len(rows), *batch_labels.shape[1:]), dtype=batch_labels.dtype)
        indices = order[done : done + len(batch_labels)]
        features[indices], labels[indices] = batch_features, batch_labels
        done += len(indices)
    assert features is not None and labels is not None and done == len(rows)
    return FeatureDataset(features, labels.tolist(), lengths)
