"""The trainer of a linear probe: run the frozen backbone once over the data, then train the head on its features."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from peft_recipes.hardware.device import synchronise
from peft_recipes.measuring.memory import PeakMemory
from peft_recipes.tasks.features import (
    Backbone,
    FeatureClassifier,
    FeatureDataset,
    Pooling,
    collate_features,
    compute_features,
)
from peft_recipes.tasks.trainer import ClassificationTrainer


class HeadTrainer(ClassificationTrainer):
    """Train on cached features where the head's input can be found exactly, else like any other trainer.

    The backbone's dropout is off, as a frozen backbone's should be. lengths: tokens of each training and of each
    validation example, None for images.
    """

    def __init__(self, *args: Any, lengths: list[list[int] | None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._lengths, self._callbacks = lengths, list(kwargs.get("callbacks") or [])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        backbone = Backbone(self.model)
        pooling = self._pooling(backbone)
        if pooling is None:
            return super().train(*args, **kwargs)
        self.may_checkpoint = False  # the features would be computed again
        with tempfile.TemporaryDirectory(prefix="features-") as folder:
            device = self.args.device.type
            start, memory = time.perf_counter(), PeakMemory(device)
            memory.reset()
            train = self._features(backbone, pooling, 0, Path(folder))
            synchronise(device)
            self.pass_figures = {"seconds": time.perf_counter() - start, "peak_memory_bytes": memory.read()}
            validation = self._features(backbone, pooling, 1, Path(folder)) if self.args.eval_strategy != "no" else None
            inner = self._feature_trainer(backbone, train, validation)
            try:
                result = inner.train(*args, **kwargs)
            finally:
                self.state, self._counts, self.batches = inner.state, inner._counts, "features"
        return result

    def _pooling(self, backbone: Backbone) -> Pooling | None:
        strategies = ("random", "sequential", "group_by_length")  # that a dataset of features supports
        if self.args.neftune_noise_alpha:  # noise on the embeddings: a text's features are others in every step
            return None
        if self.args.n_gpu > 1 or self.args.train_sampling_strategy not in strategies:
            return None
        self.model.eval()
        rows = [self.train_dataset[i] for i in range(min(4, len(self.train_dataset)))]
        batch = self._prepare_inputs(self.data_collator(rows))
        return backbone.pooling({k: v for k, v in batch.items() if k != "labels"})

    def _features(self, backbone: Backbone, pooling: Pooling, split: int, folder: Path) -> FeatureDataset:
        rows = (self.train_dataset, self.eval_dataset)[split]
        return compute_features(self, backbone, pooling, rows, self._lengths[split], folder / f"{split}.npy")

    def _feature_trainer(
        self, backbone: Backbone, train: FeatureDataset, validation: FeatureDataset | None
    ) -> ClassificationTrainer:
        args = copy.copy(self.args)
        args.remove_unused_columns = False
        args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None  # features are only stacked
        args.dataloader_persistent_workers = False
        args.label_names = ["labels"]
        # Both names of gradient checkpointing: it concerns the backbone, which is not trained.
        args.gradient_checkpointing = args.activation_checkpointing = False
        trainer = ClassificationTrainer(
            model=FeatureClassifier(self.model, backbone),
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collate_features,
            compute_metrics=self.compute_metrics,
            callbacks=self._callbacks,
            problem=self.problem,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.recipe_batch_size, trainer.on_data = self.recipe_batch_size, self.on_data
        trainer.may_checkpoint = False
        return trainer
