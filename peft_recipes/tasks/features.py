"""A head learns on features: the frozen backbone runs once over the data, not once an epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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

# What a classifier's head reads of the backbone's output, by place. Which one a model uses is tried, not looked up.
Pick = Callable[[Any, dict[str, Any]], torch.Tensor]


def _pooled(output: Any, batch: dict[str, Any]) -> torch.Tensor:
    return output.pooler_output


def _first(output: Any, batch: dict[str, Any]) -> torch.Tensor:
    return output[0][:, 0]


def _last(output: Any, batch: dict[str, Any]) -> torch.Tensor:
    ends = batch["attention_mask"].sum(1) - 1
    return output[0][torch.arange(len(ends), device=ends.device), ends]


def _whole(output: Any, batch: dict[str, Any]) -> torch.Tensor:
    return output


class Backbone:
    """The frozen part of a classification model, which can be run alone, or stood in for by stored features.

    A transformers model's base model, or the method `features` of a model that has no such part (the small CNN).
    """

    def __init__(self, model: nn.Module):
        self.model = model
        whole = model.base_model is model
        self.owner: Any = model if whole else model.base_model
        self.name = "features" if whole else "forward"
        self.exists = hasattr(self.owner, self.name) and not (whole and not hasattr(model, "features"))

    @contextlib.contextmanager
    def replaced(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        """Within it, the model calls `stand_in` where it would call its backbone."""
        setattr(self.owner, self.name, stand_in)
        try:
            yield
        finally:
            delattr(self.owner, self.name)  # the class's own method comes back

    def output(self, batch: dict[str, Any]) -> Any:
        """What the backbone gives for a batch."""
        if self.name == "features":
            return self.model.features(**batch)
        return self.owner(**batch)

    def output_and_logits(self, batch: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """What the backbone gives for a batch, and the whole model's logits."""
        seen: list[Any] = []
        original = getattr(self.owner, self.name)

        def listening(*args: Any, **kwargs: Any) -> Any:
            seen.append(original(*args, **kwargs))
            return seen[-1]

        with self.replaced(listening):
            logits = self.model(**batch).logits
        return seen[0], logits

    def logits_of(self, features: torch.Tensor) -> torch.Tensor:
        """The head's logits [batch, classes] of features [batch, width]."""
        with self.replaced(lambda *_, **__: self.stand_in(features)):
            return self.model(**self.dummy(features)).logits

    def stand_in(self, features: torch.Tensor) -> Any:
        if self.name == "features":
            return features
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=features.unsqueeze(1), pooler_output=features
        )

    def dummy(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """An input of the right batch size whose one token is no padding: what the model reads beside the backbone."""
        if self.model.main_input_name != "input_ids":
            return {self.model.main_input_name: features}
        pad = self.model.config.pad_token_id
        ids = torch.full((len(features), 1), 1 if pad != 1 else 0, device=features.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def pick(self, batch: dict[str, Any]) -> Pick | None:
        """What the head reads, found by giving it back and comparing logits; None where nothing fits exactly."""
        if not self.exists:
            return None
        output, logits = self.output_and_logits(batch)
        if float((logits - logits[0]).abs().max()) == 0:
            return None  # a head that says the same of all examples can't tell what it reads
        for pick in (_whole,) if self.name == "features" else (_pooled, _first, _last):
            try:
                picked = pick(output, batch)
                found = self.logits_of(picked) if picked.dim() == 2 else logits.new_empty(0)
            except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError):
                continue
            size = max(1.0, float(logits.abs().max()))
            if found.shape == logits.shape and float((found - logits).abs().max()) <= _SAME * size:
                return pick
        return None


class OnFeatures(torch.nn.Module):
    """A classification model fed with stored features instead of examples; its head's weights are the model's own."""

    def __init__(self, model: nn.Module, backbone: Backbone):
        super().__init__()
        self.model, self.backbone = model, backbone
        self.config = model.config

    def forward(self, features: torch.Tensor) -> SequenceClassifierOutput:
        """Logits [batch, classes] of features [batch, width]."""
        return SequenceClassifierOutput(logits=self.backbone.logits_of(features))


class FeatureRows(torch.utils.data.Dataset):
    """The features of a split, in its order: an array in memory, or a memory-mapped file."""

    def __init__(self, features: np.ndarray, labels: list[int], lengths: list[int] | None):
        self.features, self.labels, self.lengths = features, labels, lengths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = self.lengths[i] if self.lengths else 0
        return {FEATURES: self.features[i], "labels": self.labels[i], "tokens": tokens}


def collate_features(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """features [batch, width] and labels [batch]; a stored feature is one position to compute, and no padding."""
    return {
        FEATURES: torch.from_numpy(np.stack([row[FEATURES] for row in rows])),
        "labels": torch.tensor([row["labels"] for row in rows]),
        COUNTS: Counts(sum(row["tokens"] for row in rows), len(rows), 0, len(rows)),
    }


@torch.no_grad()
def feature_rows(trainer: Trainer, backbone: Backbone, pick: Pick, rows: Any, lengths: list[int] | None, file: Path):
    """The features of a split, by the trainer's own loader, the longest first; in a file where they are many.

    Several processes compute a share each and have all of them afterwards, as when they evaluate.
    """
    order = np.argsort([-n for n in lengths], kind="stable") if lengths else np.arange(len(rows))
    sorted_rows = rows.select(order) if lengths else rows
    made: np.ndarray | None = None
    labels = np.empty(len(rows), dtype=np.int64)
    done = 0
    trainer.model.eval()
    loader = trainer.accelerator.prepare_data_loader(
        torch.utils.data.DataLoader(
            sorted_rows, batch_size=trainer.args.eval_batch_size, collate_fn=trainer.data_collator
        )
    )
    for given in loader:
        batch = trainer._prepare_inputs(given)
        own = batch.pop("labels")
        with trainer.compute_loss_context_manager():
            computed = pick(backbone.output(batch), batch).float()
        features, found = (t.cpu().numpy() for t in trainer.accelerator.gather_for_metrics((computed, own)))
        here = order[done : done + len(found)]
        labels[here] = found
        if made is None:
            shape = (len(rows), features.shape[1])
            large = shape[0] * shape[1] * 4 > IN_MEMORY_BYTES
            made = np.lib.format.open_memmap(file, "w+", np.float32, shape) if large else np.empty(shape, np.float32)
        made[here] = features
        done += len(here)
    assert made is not None and done == len(rows)
    return FeatureRows(made, labels.tolist(), lengths)
