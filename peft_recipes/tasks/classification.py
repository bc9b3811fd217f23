"""The base class of text and image classification: trainer, metrics, per-class report and predictions."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax
from transformers import EvalPrediction, Trainer, TrainingArguments

from peft_recipes.data.prepared import Prepared
from peft_recipes.models.architecture_table import head_modules
from peft_recipes.models.meta import label_options
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks import metrics
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.head_trainer import HeadTrainer
from peft_recipes.tasks.trainer import ClassificationTrainer

if TYPE_CHECKING:
    import torch.nn as nn


def _cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[examples] cross-entropy in nats of logits [examples, classes] for labels [examples]."""
    return -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """accuracy, macro F1 and loss of logits [examples, classes]."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    loss = float(_cross_entropies(logits, labels).mean())
    return {**metrics.class_metrics(logits.argmax(axis=1), labels), "loss": loss}


class Classification(Task):
    """Assign each example to one of the recipe's classes, with transformers' Trainer."""

    @abstractmethod
    def collator(self, prepared: Prepared) -> Any:
        """The data collator."""

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: TrainingArguments, callbacks: list[Any]):
        options = {
            "model": model,
            "args": arguments,
            "train_dataset": prepared.splits["train"],
            "eval_dataset": prepared.splits["validation"],
            "data_collator": self.collator(prepared),
            "compute_metrics": classification_metrics,
            "callbacks": callbacks,
        }
        if _trains_head_alone(model):
            return HeadTrainer(lengths=[self.lengths(prepared, split) for split in ("train", "validation")], **options)
        return ClassificationTrainer(**options)

    def base_options(self, prepared: Prepared | None) -> dict[str, Any]:
        return label_options((prepared.labels if prepared else None) or self.recipe.dataset.labels)

    def evaluate(self, trainer: Trainer, prepared: Prepared, split: str) -> Evaluation:
        rows, lengths = prepared.splits[split], self.lengths(prepared, split)
        order = np.argsort([-n for n in lengths], kind="stable") if lengths else np.arange(len(rows))
        output = trainer.predict(rows.select(order) if lengths else rows)
        logits, labels = np.empty_like(output.predictions), np.empty_like(output.label_ids)
        logits[order], labels[order] = output.predictions, output.label_ids
        predicted = logits.argmax(axis=1)
        return Evaluation(
            metrics=classification_metrics(EvalPrediction(predictions=logits, label_ids=labels)),
            predictions={
                "id": prepared.ids[split],
                "label": labels.tolist(),
                "prediction": predicted.tolist(),
                "loss": _cross_entropies(logits, labels).tolist(),
            },
            per_class=metrics.per_class(predicted, labels, prepared.labels),
        )


def _trains_head_alone(model: nn.Module) -> bool:
    """Whether only the task head is trainable, so that the backbone's output is the same in every epoch."""
    head = tuple(f"{name}." for name in head_modules(model)) if not hasattr(model, "peft_config") else ()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    return bool(head and trainable) and all(name.startswith(head) for name in trainable)
