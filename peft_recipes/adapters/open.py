"""Open a saved adapter for use: find its task, base and class names, and load the base when it is needed."""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peft_recipes.adapters.check import check_fit
from peft_recipes.adapters.embeddings import fit_vocabulary
from peft_recipes.adapters.infer_task import base_config, base_quantisation, class_names, infer_task
from peft_recipes.adapters.saved import SavedAdapter, read_adapter
from peft_recipes.data.prepared import Prepared
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.device import Hardware, choose
from peft_recipes.models import bases
from peft_recipes.models.quantisation import dequantised
from peft_recipes.models.virtual_tokens import read_last_token
from peft_recipes.recipe.dataset import CLASSES
from peft_recipes.recipe.options import LANGUAGE_TASKS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.predictions import Evaluation
from peft_recipes.tasks.base import Task
from peft_recipes.tasks.registry import task_of


@dataclass
class OpenedAdapter:
    """A saved adapter with its task. labels: class names; None if the base's own are used, or for a language model."""

    saved: SavedAdapter
    task: Task
    labels: list[str] | None

    @property
    def folder(self) -> Path:
        return self.saved.folder

    @property
    def recipe(self) -> Recipe:
        return self.task.recipe

    @property
    def base_name(self) -> str:
        """The base, as the adapter or its recipe names it: a Hub id, a folder, "embedded:NAME"."""
        return self.recipe.model

    @functools.cached_property
    def quantise(self) -> str | None:
        """How the base was quantised in training ("nf4", "int8"); None: not at all."""
        return base_quantisation(self.saved, self.recipe)

    @property
    def problem_type(self) -> str:
        """What a classifier predicts: one class, several classes or a number."""
        return self.recipe.dataset.problem_type or CLASSES

    @property
    def generates(self) -> bool:
        return self.recipe.task in LANGUAGE_TASKS

    @property
    def encodes(self) -> bool:
        """Whether the base is an encoder-decoder: it reads a prompt with its encoder, and its answer begins anew."""
        return self.recipe.task == "seq2seq"

    @property
    def has_own_head(self) -> bool:
        """Whether the task head is saved with the adapter, so that the head of the base alone is untrained."""
        return bool(getattr(self.saved.config, "modules_to_save", None)) and not self.generates

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The run's own data. Raises RecipeError if the adapter is not a run of peft-recipes."""
        if not self.saved.is_run:
            raise RecipeError(f"{self.folder} is no run of peft-recipes: it does not say what it was tested on.")
        return self.task.prepare()

    @functools.cached_property
    def processor(self) -> Any:
        """The adapter's own tokenizer, else the base's, or its image processor; None if the model has none."""
        if self.recipe.task == "image-classification":
            return self.task._processor()
        return bases.load_tokenizer(self.recipe, self.folder if self.has_own_tokenizer else None)

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer, with the chat template and the end token of the training."""
        return (self.folder / "tokenizer_config.json").is_file()

    def load_base(self, dequantise: bool = False) -> nn.Module:
        """Load the base in evaluation mode onto this machine's device.

        A base that was quantised in training is quantised again; dequantise: it then gets the full-precision weights
        that the quantised ones stand for, which an adapter can be merged into.
        """
        import transformers

        transformers.set_seed(0)  # so that a new head has the same weights each time
        trained_here = self.recipe.pretraining is not None
        prepared = self.prepared if trained_here else Prepared({}, {}, "", self.processor, self.labels)
        base, _ = self.task.load_base(prepared, self.quantise)
        if self.quantise and not dequantise:
            return base.eval()  # quantised weights are on their device already
        base = dequantised(base) if self.quantise else base
        return base.to(self.hardware().device).eval()

    def attach(self, base: nn.Module) -> nn.Module:
        """Load the adapter onto its base, in evaluation mode."""
        from peft import PeftModel

        fit_vocabulary(self.saved, base)
        model = PeftModel.from_pretrained(base, self.folder).eval()
        read_last_token(model)
        return model

    def hardware(self) -> Hardware:
        return choose(self.recipe.training, self.recipe.threads)

    def base_location(self) -> str:
        """The base's folder or Hub id, with its quantisation: equal for adapters that can share a base."""
        if self.recipe.pretraining is not None:
            return str(self.task.base_folder(self.prepared))
        location = self.base_name if self.base_name == bases.SMALL_CNN else bases.location(self.base_name)
        return (str(Path(location).resolve()) if Path(location).exists() else location) + (self.quantise or "")


def open_adapter(folder: str | Path, base: str | None = None, *, trust_remote_code: bool = False) -> OpenedAdapter:
    """Open an adapter on disk, trained here or elsewhere, and check that it fits its base, without the base's weights.

    base: in place of the one that the adapter names. Raises RecipeError: no adapter, no such base, it does not fit.
    """
    saved = read_adapter(folder)
    task = infer_task(saved, base, trust_remote_code)
    fit = check_fit(saved, task, base_config(saved, task))
    if fit.ok is False:
        raise RecipeError(f"{saved.folder} does not fit its base: {fit.message}.")
    if note := saved.unknown_note:
        print(f"Note: {saved.folder}: {note}.", file=sys.stderr, flush=True)
    adapter = OpenedAdapter(saved, task, class_names(saved, task.recipe))
    decodes_only = adapter.generates and not adapter.encodes
    if decodes_only and not saved.is_run and adapter.processor.chat_template is not None:
        # Trained elsewhere on a chat model: prompts go through the base's chat template, as in SFT.
        adapter.task = task_of(dataclasses.replace(task.recipe, task="sft"))
    return adapter


def open_adapters(
    folders: Sequence[str | Path], base: str | None = None, *, trust_remote_code: bool = False
) -> dict[str, OpenedAdapter]:
    """Open several adapters of one base, each under the shortest name that is not another's.

    Raises RecipeError if one is given twice, or two have different bases or kinds of task.
    """
    names = short_names([Path(folder) for folder in folders])
    adapters = [open_adapter(folder, base, trust_remote_code=trust_remote_code) for folder in folders]
    first = adapters[0]
    for other in adapters[1:]:
        if other.base_location() != first.base_location():
            raise RecipeError(
                f"Adapters of one base only: {first.folder} was made for {_base_label(first)}, {other.folder} for "
                f"{_base_label(other)}."
            )
        if other.generates != first.generates:
            raise RecipeError(f"{first.folder} is for {first.recipe.task}, {other.folder} for {other.recipe.task}.")
    return dict(zip(names, adapters, strict=True))


def _base_label(adapter: OpenedAdapter) -> str:
    return f"'{adapter.base_name}'{f' in {adapter.quantise}' if adapter.quantise else ''}"


def short_names(folders: Sequence[Path]) -> list[str]:
    """Name each folder: a run by its arm, then seed, then recipe, until all names differ; others by their path's end.

    Raises RecipeError for a folder that is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise RecipeError(f"{folders[i]} is given twice.")
    for depth in range(max(len(path.parts) for path in paths)):
        names = [_name(path, depth) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _name(path: Path, depth: int) -> str:
    if (path / "recipe.yaml").is_file() and path.name.startswith("seed-"):
        seed, arm, recipe, *above = reversed(path.parts)
        return "-".join([[arm], [arm, seed], [recipe, arm, seed], [*reversed(above), recipe, arm, seed]][min(depth, 3)])
    return "-".join(path.parts[-1 - depth :])


def evaluate(adapter: OpenedAdapter, model: nn.Module) -> Evaluation:
    """Evaluate a model on the test split of the adapter's run, as training does."""
    from transformers import PrinterCallback

    task, prepared = adapter.task, adapter.prepared
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        arguments = task.arguments(None, 0, adapter.hardware(), Path(folder), True)
        trainer = task.trainer(model, prepared, arguments, [])
        trainer.remove_callback(PrinterCallback)
        evaluation = task.evaluate(trainer, prepared, "test")
    if evaluation.errors:
        raise RecipeError(*evaluation.errors.values())
    return evaluation
