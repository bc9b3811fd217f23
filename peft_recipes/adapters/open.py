"""A saved adapter ready to be asked: its task, its classes, its base and the data that it was tested on.

A run's folder says all of it in recipe.yaml; of an adapter made elsewhere PEFT's configuration and the base tell it.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.adapters.saved import SavedAdapter, read_adapter
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.options import LANGUAGE_TASKS

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.recipe.recipe import Recipe
    from peft_recipes.runs.predictions import Evaluation
    from peft_recipes.tasks.base import Task


@dataclass
class Served:
    """A saved adapter, the task it is for, and its classes (None: the base's own, or no classification)."""

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
    def model(self) -> str:
        """The base, as the adapter or its recipe names it."""
        return self.recipe.model

    @functools.cached_property
    def quantise(self) -> str | None:
        """How the base was quantised that it learnt on ("nf4", "int8"); None: not at all."""
        from peft_recipes.adapters.check import quantisation_of

        return quantisation_of(self.saved, self.recipe)

    @property
    def generates(self) -> bool:
        return self.recipe.task in LANGUAGE_TASKS

    @property
    def is_run(self) -> bool:
        """Whether it is a run of ours, whose recipe tells the data that it was tested on."""
        return (self.folder / "recipe.yaml").is_file()

    @property
    def brings_head(self) -> bool:
        """Whether the task head is saved with it, so that its base alone has none that learnt anything."""
        return bool(getattr(self.saved.config, "modules_to_save", None)) and not self.generates

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The run's own data, whole. Raises RecipeError where it is no run of ours."""
        if not self.is_run:
            raise RecipeError(f"{self.folder} is no run of peft-recipes: it does not say what it was tested on.")
        return self.task.prepare()

    @functools.cached_property
    def processor(self) -> Any:
        """The base's tokenizer, or its image processor; None where images are scaled by hand."""
        if self.recipe.task == "image-classification":
            return self.task._processor()
        from peft_recipes.models import bases

        return bases.load_tokenizer(self.recipe)

    def without_data(self) -> Prepared:
        """What loading the base and asking it needs, without any example; all of it where the base is trained here."""
        from peft_recipes.data.prepared import Prepared

        if self.recipe.pretraining is not None:
            return self.prepared
        return Prepared({}, {}, "", self.processor, self.labels)

    def load_base(self, whole: bool = False) -> nn.Module:
        """The base with its weights, in evaluation mode, on the device that this machine computes on.

        A base that the adapter learnt on quantised is quantised again; whole: with the weights that these stand for.
        """
        import transformers

        from peft_recipes.models.quantisation import dequantised

        transformers.set_seed(0)  # a head that is new is drawn alike each time
        base, _ = self.task.load_base(self.without_data(), self.quantise)
        if self.quantise and not whole:
            return base.eval()  # it was loaded to its device
        base = dequantised(base) if self.quantise else base
        return base.to(self.hardware().device).eval()

    def on(self, base: nn.Module) -> nn.Module:
        """The adapter on its base, in evaluation mode."""
        from peft import PeftModel

        from peft_recipes.models.virtual_tokens import read_last_token

        model = PeftModel.from_pretrained(base, self.folder).eval()
        read_last_token(model)
        return model

    def hardware(self) -> Any:
        from peft_recipes.hardware.device import choose

        return choose(self.recipe.training, self.recipe.threads)

    def base_place(self) -> str:
        """Where the base lies (a folder, a Hub id): adapters with the same place sit on the same base."""
        from peft_recipes.models import bases

        if self.recipe.pretraining is not None:
            return str(self.task.base_folder(self.prepared))
        place = bases.location(self.model) if self.model != bases.SMALL_CNN else self.model
        return (str(Path(place).resolve()) if Path(place).exists() else place) + (self.quantise or "")

    @property
    def base_words(self) -> str:
        """The base as a message names it."""
        return f"'{self.model}'{f' in {self.quantise}' if self.quantise else ''}"

    def evidence(self) -> dict[str, Any]:
        """Its run.json; empty where there is none."""
        try:
            found = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def open_adapter(folder: str | Path, base: str | None = None, *, trust_remote_code: bool = False) -> Served:
    """A saved adapter of this machine, ours or anyone's, nothing loaded but its own files and its base's configuration.

    base: instead of the one that it names. Raises RecipeError: no adapter there, no such base, it does not fit.
    """
    from peft_recipes.adapters.check import adapter_task, base_config, class_names, fit
    from peft_recipes.tasks.registry import task_of

    saved = read_adapter(folder)
    task = adapter_task(saved, base, trust_remote_code)
    found = fit(saved, task, base_config(saved, task))
    if found.ok is False:
        raise RecipeError(f"{saved.folder} does not fit its base: {found.said}.")
    served = Served(saved, task, class_names(saved, task.recipe))
    if served.generates and not served.is_run and served.processor.chat_template is not None:
        # Made elsewhere on a base that chats: it is asked as that base is.
        served.task = task_of(_with_task(task.recipe, "sft"))
    return served


def _with_task(recipe: Recipe, task: str) -> Recipe:
    import dataclasses

    return dataclasses.replace(recipe, task=task)


def open_adapters(
    folders: Sequence[str | Path], base: str | None = None, *, trust_remote_code: bool = False
) -> dict[str, Served]:
    """Several adapters of one base, each under the shortest name that tells it from the others.

    Raises RecipeError where one is given twice, or two sit on different bases or are for different kinds of task.
    """
    names = short_names([Path(folder) for folder in folders])
    served = [open_adapter(folder, base, trust_remote_code=trust_remote_code) for folder in folders]
    first = served[0]
    for other in served[1:]:
        if other.base_place() != first.base_place():
            raise RecipeError(
                f"Adapters of one base only: {first.folder} was made for {first.base_words}, {other.folder} for "
                f"{other.base_words}."
            )
        if other.generates != first.generates:
            raise RecipeError(f"{first.folder} is for {first.recipe.task}, {other.folder} for {other.recipe.task}.")
    return dict(zip(names, served, strict=True))


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: a run's arm, where that is not enough with its seed, then with its recipe; a folder's own
    name elsewhere. Raises RecipeError for a folder that is given twice."""
    places = [folder.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise RecipeError(f"{folders[i]} is given twice.")
    for depth in range(max(len(place.parts) for place in places)):
        names = [_name(place, depth) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _name(place: Path, depth: int) -> str:
    if (place / "recipe.yaml").is_file() and place.name.startswith("seed-"):
        seed, arm, recipe, *above = reversed(place.parts)
        return "-".join([[arm], [arm, seed], [recipe, arm, seed], [*reversed(above), recipe, arm, seed]][min(depth, 3)])
    return "-".join(place.parts[-1 - depth :])


def evaluate(served: Served, model: nn.Module, split: str = "test") -> Evaluation:
    """A split of the run's own data by a model, as training evaluates it."""
    from transformers import PrinterCallback

    task, prepared = served.task, served.prepared
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        arguments = task.arguments(None, 0, served.hardware(), Path(folder), True)
        trainer = task.trainer(model, prepared, arguments, [])
        trainer.remove_callback(PrinterCallback)
        return task.evaluate(trainer, prepared, split)
