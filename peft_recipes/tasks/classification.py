"""What text and image classification share: the Trainer, the metrics, the per-class report, the predictions."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
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


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[examples] cross entropy in nats of logits [examples, classes] for labels [examples]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """accuracy, macro F1 and loss of logits [examples, classes]."""
    logits, labels = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
    guesses = logits.argmax(axis=1)
    return {
        **metrics.class_metrics(guesses, labels),
        "loss": float(cross_entropies(logits, labels).mean()),
    }


class Classification(Task):
    """Examples into one of the recipe's classes, by transformers' Trainer."""

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: TrainingArguments, callbacks: list[Any]):
        kind, more = ClassificationTrainer, {}
        if self.trains_head_alone(model):
            kind, more = HeadTrainer, {"lengths": [self.lengths(prepared, s) for s in ("train", "validation")]}
        return kind(
            model=model,
            args=arguments,
            train_dataset=prepared.splits["train"],
            eval_dataset=prepared.splits["validation"],
            data_collator=self.collator(prepared),
            compute_metrics=classification_metrics,
            callbacks=callbacks,
            **more,
        )

    def trains_head_alone(self, model: nn.Module) -> bool:
        """Whether only the task head's own weights learn, so that the rest gives the same every epoch."""
        head = tuple(f"{name}." for name in head_modules(model)) if not hasattr(model, "peft_config") else ()
        learning = [name for name, p in model.named_parameters() if p.requires_grad]
        return bool(head and learning) and all(name.startswith(head) for name in learning)

    @abstractmethod
    def collator(self, prepared: Prepared) -> Any:
        """Examples to one batch."""

    def base_options(self, prepared: Prepared | None) -> dict[str, Any]:
        return label_options((prepared.labels if prepared else None) or self.recipe.dataset.labels)

    def evaluate(self, trainer: Trainer, prepared: Prepared, split: str) -> Evaluation:
        rows, lengths = prepared.splits[split], self.lengths(prepared, split)
        order = np.argsort([-n for n in lengths], kind="stable") if lengths else np.arange(len(rows))
        output = trainer.predict(rows.select(order) if lengths else rows)
        logits, labels = np.empty_like(output.predictions), np.empty_like(output.label_ids)
        logits[order], labels[order] = output.predictions, output.label_ids
        guesses, losses = logits.argmax(axis=1), cross_entropies(logits.astype(np.float64), labels)
        return Evaluation(
            metrics=classification_metrics(EvalPrediction(predictions=logits, label_ids=labels)),
            predictions={
                "id": prepared.ids[split],
                "label": labels.tolist(),
                "prediction": guesses.tolist(),
                "loss": losses.tolist(),
            },
            per_class=metrics.per_class(guesses, labels, prepared.labels),
        )
