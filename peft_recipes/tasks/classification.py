"""The base class of text and image classifiers: trainer, metrics, per-class report and predictions."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import EvalPrediction, Trainer, TrainingArguments

from peft_recipes.data.prepared import Prepared
from peft_recipes.models.architecture_table import head_modules
from peft_recipes.models.meta import label_options
from peft_recipes.recipe.dataset import CLASSES
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.head_trainer import HeadTrainer
from peft_recipes.tasks.problem_types import PROBLEM_TYPES, ProblemType
from peft_recipes.tasks.trainer import ClassificationTrainer

if TYPE_CHECKING:
    import torch.nn as nn


class Classification(Task):
    """Assign a class to each example (of texts also several classes, or a number), with transformers' Trainer."""

    def problem(self, prepared: Prepared | None) -> ProblemType:
        """What the labels are: as the data was found to have them, else as the recipe says, else one class."""
        found = prepared.problem_type if prepared else None
        return PROBLEM_TYPES[found or self.recipe.dataset.problem_type or CLASSES]

    @abstractmethod
    def collator(self, prepared: Prepared) -> Any:
        """The data collator."""

    def trainer(self, model: nn.Module, prepared: Prepared, arguments: TrainingArguments, callbacks: list[Any]):
        problem = self.problem(prepared)

        def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
            return problem.metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))

        options = {
            "model": model,
            "args": arguments,
            "train_dataset": prepared.train_rows(arguments.data_seed),
            "eval_dataset": prepared.splits["validation"],
            "data_collator": self.collator(prepared),
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "problem": problem,
        }
        if trains_head_alone(model):
            return HeadTrainer(lengths=[self.lengths(prepared, split) for split in ("train", "validation")], **options)
        return ClassificationTrainer(**options)

    def base_options(self, prepared: Prepared | None) -> dict[str, Any]:
        names = (prepared.labels if prepared else None) or self.recipe.dataset.labels
        return label_options(names, self.problem(prepared).name)

    def evaluate(self, trainer: Trainer, prepared: Prepared, split: str) -> Evaluation:
        rows, lengths = prepared.splits[split], self.lengths(prepared, split)
        order = np.argsort([-n for n in lengths], kind="stable") if lengths else np.arange(len(rows))
        output = trainer.predict(rows.select(order) if lengths else rows)
        logits, labels = np.empty_like(output.predictions), np.empty_like(output.label_ids)
        logits[order], labels[order] = output.predictions, output.label_ids
        problem = self.problem(prepared)
        predicted = problem.predicted(logits)
        scores = problem.example_scores(predicted, labels)
        return Evaluation(
            metrics=problem.metrics(logits, labels),
            predictions={
                "id": prepared.ids[split],
                "label": problem.column(labels),
                "prediction": problem.column(predicted),
                **{name: values.tolist() for name, values in scores.items()},
                "loss": problem.losses(logits, labels).tolist(),
            },
            per_class=problem.per_class(predicted, labels, prepared.labels),
        )


def trains_head_alone(model: nn.Module) -> bool:
    """Whether only the task head is trainable, so that the backbone's output is the same in every epoch."""
    head = tuple(f"{name}." for name in head_modules(model)) if not hasattr(model, "peft_config") else ()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    return bool(head and trainable) and all(name.startswith(head) for name in trainable)
