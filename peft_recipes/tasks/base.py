"""The base class of tasks: prepare the data, load the base, build the trainer, evaluate a split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.data import formats, mixing, sources, streaming
from peft_recipes.data.prepared import Prepared
from peft_recipes.data.skipped import SkippedRows
from peft_recipes.errors import RecipeError, within
from peft_recipes.hardware.device import Hardware
from peft_recipes.kernels import activations
from peft_recipes.models import bases, quantisation
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.dataset import EMBEDDED, Dataset
from peft_recipes.recipe.options import TASKS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks import reading, streamed
from peft_recipes.tasks.run_options import loader_options, run_arguments
from peft_recipes.trackers.choice import check_trackers

if TYPE_CHECKING:
    import datasets
    import torch
    import torch.nn as nn
    from transformers import PretrainedConfig, Trainer, TrainingArguments


class Task(ABC):
    """Everything that differs between tasks; the stages of a run (training/) call these methods alone."""

    collates_in_workers = True  # on a GPU, whose batches are made in processes of their own
    sequences_per_example = 1  # sequences that the model computes for one example
    reads_test = True  # a scan sets False: then the test split is dropped before anything reads it

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.reading: Dataset | None = None  # of several datasets, the one that is being read
        self.stream: Any = None  # of a recipe that streams its data, see streamed.py
        self.settled: dict[str, Any] = {}  # options of a streamed dataset, as its first rows settle them
        self.notes: list[str] = []  # on further evaluation sets that could not be loaded
        self.read: dict[str, datasets.Dataset] = {}  # the raw splits, as they were read last
        self.skipped: dict[str, SkippedRows] = {}  # by split: the rows that can't be used

    @abstractmethod
    def prepare(self) -> Prepared:
        """Load and check the data, and turn it into what the trainer takes. Raises RecipeError."""

    @abstractmethod
    def trainer(
        self, model: nn.Module, prepared: Prepared, arguments: TrainingArguments, callbacks: list[Any]
    ) -> Trainer:
        """Build the Trainer, SFTTrainer or DPOTrainer of this task."""

    @abstractmethod
    def evaluate(self, trainer: Trainer, prepared: Prepared, split: str) -> Evaluation:
        """Evaluate one split: metrics and per-example results, each example exactly once, in the split's order."""

    @abstractmethod
    def model_inputs(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One prepared example as a batch of one for the model's forward, without labels, on the CPU."""

    @abstractmethod
    def largest_batch(self, model: nn.Module, prepared: Prepared | None, size: int) -> dict[str, torch.Tensor]:
        """A batch as large as any in training: of the data, or (prepared None) of examples of max_length."""

    def inputs(self, prepared: Prepared, count: int) -> list[dict[str, torch.Tensor]]:
        """The first `count` test examples, each as a batch of one for the model's forward, on the CPU."""
        test = prepared.splits["test"]
        return [self.model_inputs(test[i]) for i in range(min(count, len(test)))]

    def lengths(self, prepared: Prepared, split: str) -> list[int] | None:
        """Tokens of each example, by which evaluation is sorted; None where all are alike (images)."""
        return None

    def step_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch, computed as in the trainer."""
        with activations.recomputed():
            return model(**batch).loss

    def for_trial(self, prepared: Prepared, steps: int) -> Prepared:
        """The part of the data that a trial of a few steps needs, where preparing the rest is slow."""
        return prepared

    def example_order(self, config: PretrainedConfig) -> str | None:
        """The order in which all arms see the examples (TrainingArguments' train_sampling_strategy), if the recipe
        does not set it; None for Trainer's own. It depends on the recipe and its base alone, never on an arm.
        """
        return None

    def found(self, prepared: Prepared) -> dict[str, Any]:
        """What the data settles of the recipe: changes to it, so that it says the same without the data."""
        return {}

    def base_options(self, prepared: Prepared | None) -> dict[str, Any]:
        """Options for the base's configuration (the labels). prepared: None when only a plan is made."""
        return {}

    def load_base(self, prepared: Prepared, quantise: str | None = None) -> tuple[nn.Module, list[str]]:
        """Load the base with the task's head; return it with the names of its newly initialised weights.

        The seed must be set before. quantise: "nf4" or "int8", as an arm sets it; None: fp32.
        """
        import transformers

        model, new_weights = bases.load_model(
            self.recipe,
            getattr(transformers, TASKS[self.recipe.task].auto_class),
            folder=self.base_folder(prepared),
            quantise=quantise,
            **self.base_options(prepared),
        )
        if hasattr(prepared.processor, "pad_token_id"):
            bases.set_pad_token(model, prepared.processor)
        return model, new_weights

    def use_base(self, base: nn.Module, prepared: Prepared, quantise: str | None = None) -> None:  # noqa: B027
        """Compute what the task needs of the untrained base, before an arm is applied; every rank calls it.

        quantise: how the base was loaded.
        """

    def base_folder(self, prepared: Prepared) -> Path | None:
        """The folder of a base that is pretrained here; None for one that the recipe's `model` names."""
        return None

    def arguments(
        self,
        arm: Arm | None,
        seed: int,
        hardware: Hardware,
        folder: Path,
        quiet: bool,
        defaults: dict[str, Any] | None = None,
    ) -> TrainingArguments:
        """The training options of one run (run_options.py). defaults: the task's own."""
        loading = loader_options(self.recipe, hardware.device, self.collates_in_workers)
        return run_arguments(self.recipe, arm, seed, hardware, folder, quiet, {**loading, **(defaults or {})})

    def check_arguments(self, arm: Arm | None, hardware: Hardware) -> None:
        """Raise RecipeError for training options that their own class refuses, and where bitsandbytes is missing."""
        try:
            arguments = self.arguments(arm, 0, hardware, Path("unused"), True)
        except RecipeError:
            raise
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"training: {' '.join(str(error).split())}") from error
        if arguments.fp16 and hardware.device == "cpu":
            raise RecipeError("training.fp16: no effect on the CPU. Leave it out, or set training.bf16.")
        check_trackers(self.recipe.training, connect=False)
        if (arm is not None and arm.quantise) or any(mark in arguments.optim for mark in quantisation.OPTIMIZERS):
            quantisation.check_available(hardware.device)

    def guards(self, name: str) -> bool:
        """Whether the guard of that name is on."""
        return name not in self.recipe.skip_checks

    def without_duplicates(
        self, splits: dict[str, datasets.Dataset], keys: list[str]
    ) -> tuple[dict[str, datasets.Dataset], list[str]]:
        """Drop examples that also occur in another split, by the columns `keys`; then mix those of several datasets.

        Returns the splits and notes.
        """
        splits, notes = formats.without_test_examples(splits, keys) if self.guards("duplicates") else (splits, [])
        splits, more = reading.mixed(self, splits)
        return splits, notes + more

    def raw_splits(self, number: int = 0) -> dict[str, datasets.Dataset]:
        """Load the raw splits of the recipe's dataset, of several of that number, and its further evaluation sets."""
        if number == 0:
            self.notes, self.skipped = [], {}
        source, notes, several = self.recipe.sources[number], [], self.recipe.datasets is not None
        splits = streamed.open_stream(self) if source.streaming else sources.load_splits(source, notes)
        self.notes += [f"{source.path}: {note}" if several else note for note in notes]
        if several:
            splits = mixing.numbered(splits, number)
        self.read = splits
        if not self.reads_test:
            return {name: rows for name, rows in splits.items() if name != "test"}
        if number:
            return splits
        for name, changes in self.recipe.evaluate_also.items():
            if set(changes) <= {"transform"}:
                splits[name] = splits["test"]
            elif (rows := self._further_set(name)) is not None:
                splits[name] = rows
        return splits

    @property
    def source(self) -> Dataset:
        """The recipe's dataset; of several, the one that is being read, else the first."""
        return self.reading or self.recipe.dataset

    def skipped_of(self, split: str, rows: datasets.Dataset) -> SkippedRows:
        """The rows of a split that are left out, of `rows` before any was; of several datasets, of the one being read.

        Of all of them together, once they are joined.
        """
        source, key = self.source_of(split), split
        if self.recipe.datasets is not None and split not in self.recipe.evaluate_also:
            key = f"{split} of {id(self.reading)}" if self.reading else split
            source = source if self.reading else replace(source, path=self.recipe.data_name)
        return self.skipped.setdefault(key, SkippedRows(source, split, len(rows)))

    def skipped_notes(self) -> list[str]:
        """A line for each split and reason for which rows are left out; of several datasets, with the path."""
        several = self.recipe.datasets is not None
        return [
            f"{skipped.source.path}: {note}" if several else note
            for skipped in self.skipped.values()
            for note in skipped.notes()
        ]

    def source_of(self, split: str) -> Dataset:
        """The source of a split: a further evaluation set names only what differs from the recipe's dataset.

        With several it differs from the one of its path, else from the first.
        """
        if (changes := self.recipe.evaluate_also.get(split)) is None:
            return self.source
        alike = [source for source in self.recipe.sources if source.path == changes.get("path")]
        return Dataset(**{**vars((alike or self.recipe.sources)[0]), **changes})

    def _further_set(self, name: str) -> datasets.Dataset | None:
        """Load a further evaluation set; None, with a note, for one that can't be loaded from the Hub."""
        source = self.source_of(name)
        if source.path in [own.path for own in self.recipe.sources]:
            if source.streaming:
                return streaming.streamed_splits(source)[0]["test"]
            return sources.load_splits(source)["test"]  # split like the recipe's own: nothing that was trained on
        on_hub = not (source.path.startswith(EMBEDDED) or bases.is_local(source.path))
        try:
            with within(f"evaluate_also.{name}"):
                return sources.load_test(source, self.notes, at_most="test" not in self.recipe.evaluate_also[name])
        except RecipeError as error:
            if not on_hub:
                raise
            self.notes.append(f"Left out: {' '.join(error.problems)}")
            return None

    def answer(self, model: nn.Module, prepared: Prepared) -> list[dict[str, str]] | None:
        """Generate answers to the recipe's prompts; None for tasks that don't generate."""
        return None

    def generation_speed(self, model: nn.Module, prepared: Prepared) -> float | None:
        """Tokens per second of greedy generation at batch size 1; None for tasks that don't generate."""
        return None
