"""What every task does: prepare the data, load the base, build the real trainer, evaluate a split, run a few inputs."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.data import columns, sources
from peft_recipes.data.prepared import Prepared
from peft_recipes.distributed import processes
from peft_recipes.distributed.batches import split_batch
from peft_recipes.errors import RecipeError, within
from peft_recipes.hardware.device import Hardware
from peft_recipes.kernels import activations
from peft_recipes.models import bases, quantisation
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import EMBEDDED, Dataset
from peft_recipes.recipe.options import TASKS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.predictions import Evaluation

if TYPE_CHECKING:
    import datasets
    import torch
    import torch.nn as nn
    from transformers import Trainer, TrainingArguments


class Task(ABC):
    """One recipe's task: all that differs between tasks is behind these methods, and training.py knows none of it."""

    sequences = 1  # that the model reads of one example
    reads_test = True  # a scan's task does not: whatever is tested on is dropped before anything looks at it

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.left_out: list[str] = []  # further evaluation sets that could not be had, and why

    @abstractmethod
    def prepare(self) -> Prepared:
        """Loads and checks the data, and makes it what the trainer takes. Raises RecipeError."""

    @abstractmethod
    def trainer(
        self, model: nn.Module, prepared: Prepared, arguments: TrainingArguments, callbacks: list[Any]
    ) -> Trainer:
        """The real Trainer or SFTTrainer of this task."""

    @abstractmethod
    def evaluate(self, trainer: Trainer, prepared: Prepared, split: str) -> Evaluation:
        """Metrics and per-example results of one split, each example exactly once, in the split's order."""

    @abstractmethod
    def inputs(self, prepared: Prepared, count: int) -> list[dict[str, torch.Tensor]]:
        """`count` test examples, each as a batch of one for the model's forward, on the CPU."""

    @abstractmethod
    def largest_batch(self, model: nn.Module, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        """A batch as large as training will see: of the data, or (prepared None) of examples of max_length."""

    def lengths(self, prepared: Prepared, split: str) -> list[int] | None:
        """Tokens of each example, by which evaluation is sorted; None where all are alike (images)."""
        return None

    def step_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch as the trainer computes it."""
        with activations.recomputed():
            return model(**batch).loss

    def for_trial(self, prepared: Prepared, steps: int) -> Prepared:
        """What is needed of the data for a few steps, where preparing the rest of it would take the trial's time."""
        return prepared

    def base_options(self, prepared: Prepared | None) -> dict[str, Any]:
        """What the base's configuration is given (the labels). prepared is None when only a plan is made."""
        return {}

    def load_base(self, prepared: Prepared, quantise: str | None = None) -> tuple[nn.Module, list[str]]:
        """The base with the task's head, and the names of its newly made weights. Its seed must be set before.

        quantise: "nf4" or "int8", as an arm says; None: fp32.
        """
        import transformers

        folder = self.base_folder(prepared)
        return bases.load_model(
            self.recipe,
            getattr(transformers, TASKS[self.recipe.task].auto_class),
            folder=folder,
            quantise=quantise,
            **self.base_options(prepared),
        )

    def base_folder(self, prepared: Prepared) -> Path | None:
        """Where the base lies when it is not what the recipe's `model` says (it was trained first)."""
        return None

    def arguments(self, arm: Arm | None, seed: int, hardware: Hardware, folder: Path, quiet: bool) -> TrainingArguments:
        """The training options of one run: the defaults that measuring needs, the recipe's own, then arm and seed."""
        options = {
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,  # a loss that is not finite must be seen, not smoothed over
            "gradient_checkpointing": False,
            "dataloader_pin_memory": hardware.device == "cuda",
            "disable_tqdm": quiet,
            **hardware.training_arguments(),
            **self.recipe.training,
            **self._batch(),
            "output_dir": str(folder),
            "seed": seed,
            "data_seed": seed,
        }
        if arm is not None:
            options["learning_rate"] = arm.learning_rate
            options |= {"optim": arm.optim} if arm.optim else {}
        if any(options.get(name) for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode")):
            # Read by Accelerate when the trainer makes it: one layer is compiled and serves for all, for any length of
            # batch. The whole model anew for each length would take longer than most runs.
            for name in ("USE_REGIONAL_COMPILATION", "USE_DYNAMIC"):
                os.environ.setdefault(f"ACCELERATE_DYNAMO_{name}", "true")
        made = self.arguments_class()(**options)
        made.lora_plus_ratio = arm.lora_plus_ratio if arm is not None else None  # read by MethodMixin
        return made

    def _batch(self) -> dict[str, int]:
        if processes.count() == 1:
            return {}
        batch, accumulated = split_batch(self.recipe.training, processes.count())
        return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}

    def check_arguments(self, arm: Arm | None, hardware: Hardware) -> None:
        """Raises RecipeError for options that the trainer's own class refuses (an optimizer it does not know), and
        where bitsandbytes is needed and missing."""
        try:
            made = self.arguments(arm, 0, hardware, Path("unused"), True)
        except RecipeError:
            raise
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"training: {' '.join(str(error).split())}") from error
        if (arm is not None and arm.quantise) or any(mark in made.optim for mark in quantisation.OPTIMIZERS):
            quantisation.check_available(hardware.device)

    def arguments_class(self) -> type[TrainingArguments]:
        module, _, name = TASKS[self.recipe.task].arguments.partition(".")
        return getattr(importlib.import_module(module), name)

    def guards(self, name: str) -> bool:
        """Whether a guard of that name is on."""
        return name not in self.recipe.skip_checks

    def without_duplicates(
        self, splits: dict[str, datasets.Dataset], keys: list[str]
    ) -> tuple[dict[str, datasets.Dataset], int]:
        """The splits without the examples that stand in a later split too, by the columns `keys`, and their count."""
        return columns.without_test_examples(splits, keys) if self.guards("duplicates") else (splits, 0)

    def raw_splits(self) -> dict[str, datasets.Dataset]:
        """The recipe's raw splits, with its further evaluation sets."""
        splits = sources.load_splits(self.recipe.dataset)
        if not self.reads_test:
            return {name: rows for name, rows in splits.items() if name != "test"}
        for name, changes in self.recipe.evaluate_also.items():
            if set(changes) <= {"transform"}:
                splits[name] = splits["test"]
            elif (rows := self._further(name)) is not None:
                splits[name] = rows
        return splits

    def source_of(self, split: str) -> Dataset:
        """Where a split comes from: a further evaluation set says what differs from the recipe's own data."""
        return Dataset(**{**vars(self.recipe.dataset), **self.recipe.evaluate_also.get(split, {})})

    def _further(self, name: str) -> datasets.Dataset | None:
        """The rows of a further evaluation set; None, with a note, for one that the Hub does not give."""
        source = self.source_of(name)
        if source.path == self.recipe.dataset.path:
            return sources.load_splits(source)["test"]  # cut as the recipe's own: nothing that was trained on
        on_hub = not (source.path.startswith(EMBEDDED) or bases.is_local(source.path))
        try:
            with within(f"evaluate_also.{name}"):
                return sources.load_test(source)
        except RecipeError as error:
            if not on_hub:
                raise
            self.left_out = [f"Left out: {' '.join(error.problems)}"]
            return None

    def answer(self, model: nn.Module, prepared: Prepared) -> list[dict[str, str]] | None:
        """The model's answers to the recipe's prompts; None for tasks that don't generate."""
        return None

    def generation_speed(self, model: nn.Module, prepared: Prepared) -> float | None:
        """Tokens a second of greedy generation at batch 1; None for tasks that don't generate."""
        return None

    def _fingerprint(self, splits: dict[str, datasets.Dataset]) -> str:
        return columns.fingerprint(splits)
