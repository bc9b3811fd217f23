"""The trainer of a `head` arm: the frozen backbone runs once over the data, then the head learns on what it gave."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from peft_recipes.hardware.device import synchronise
from peft_recipes.measuring.memory import PeakMemory
from peft_recipes.tasks.features import Backbone, FeatureRows, OnFeatures, Pick, collate_features, feature_rows
from peft_recipes.tasks.trainer import ClassificationTrainer


class HeadTrainer(ClassificationTrainer):
    """Trains on features where the head can be told exactly from its backbone, else as any other trainer.

    The backbone's dropout is off, as a frozen backbone's should be. lengths: tokens of each training and of each
    validation example, None for images.
    """

    def __init__(self, *args: Any, lengths: list[list[int] | None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._lengths, self._meters = lengths, list(kwargs.get("callbacks") or [])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        backbone = Backbone(self.model)
        pick = self._pick(backbone) if self._alone() else None
        if pick is None:
            return super().train(*args, **kwargs)
        with tempfile.TemporaryDirectory(prefix="features-") as folder:
            start, memory = time.perf_counter(), PeakMemory(self.args.device.type)
            memory.reset()
            train = self._rows(backbone, pick, 0, Path(folder))
            synchronise(self.args.device.type)
            self.pass_figures = {"seconds": time.perf_counter() - start, "peak_memory_bytes": memory.read()}
            validation = self._rows(backbone, pick, 1, Path(folder)) if self.args.eval_strategy != "no" else None
            inner = self._on_features(backbone, train, validation)
            try:
                result = inner.train(*args, **kwargs)
            finally:
                self.state, self._counts, self.batches = inner.state, inner._counts, "features"
        return result

    def _alone(self) -> bool:
        """One device a process, batches by order or length."""
        return self.args.n_gpu <= 1 and self.args.train_sampling_strategy in ("random", "sequential", "group_by_length")

    def _pick(self, backbone: Backbone) -> Pick | None:
        self.model.eval()
        rows = [self.train_dataset[i] for i in range(min(4, len(self.train_dataset)))]
        batch = self._prepare_inputs(self.data_collator(rows))
        return backbone.pick({k: v for k, v in batch.items() if k != "labels"})

    def _rows(self, backbone: Backbone, pick: Pick, split: int, folder: Path) -> FeatureRows:
        rows = (self.train_dataset, self.eval_dataset)[split]
        return feature_rows(self, backbone, pick, rows, self._lengths[split], folder / f"{split}.npy")

    def _on_features(
        self, backbone: Backbone, train: FeatureRows, validation: FeatureRows | None
    ) -> ClassificationTrainer:
        args = copy.copy(self.args)
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        # Of the backbone, which is not in it. The first name is the older one of the second.
        args.gradient_checkpointing = args.activation_checkpointing = False
        args.neftune_noise_alpha = None
        inner = ClassificationTrainer(
            model=OnFeatures(self.model, backbone),
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collate_features,
            compute_metrics=self.compute_metrics,
            callbacks=self._meters,
        )
        inner.remove_callback(PrinterCallback)
        inner.whole_batch = self.whole_batch
        inner.may_checkpoint = False
        return inner
