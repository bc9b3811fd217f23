"""A card's front matter, which the Hub reads: library, base, data, tags, licence, pipeline, measured metrics."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from peft_recipes.cards.redaction import is_place, short
from peft_recipes.models import bases
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.reporting.facts import plain
from peft_recipes.reporting.formats import metric_title
from peft_recipes.runs.folder import BASE

# Our metrics by the names under which the Hub knows them.
_HUB_METRICS = {"macro_f1": "f1", "token_accuracy": "accuracy"}
_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "openrail")


def metadata(recipe: Recipe, data: dict[str, Any]) -> ModelCardData:
    """The front matter of a run's card. data: its run.json.

    base_model only where the Hub has the base: a card that names a repository that is not there, or another's that
    happens to be called so, is worse than one without.
    """
    method, kind = str(data["method"]), kind_of(data)
    adapter, base = kind == "adapter", hub_base(recipe)
    relation = ("adapter" if adapter else "finetune") if base and kind != BASE else None
    tags = ["peft-recipes", plain(recipe.name)] + ([method.lower()] if kind != BASE else [])
    tags += [f"base_model:adapter:{base}"] if base and adapter else []
    tags += ["embedded-stand-in"] if recipe.uses_stand_ins else []
    optional = {"base_model_relation": relation} if relation else {}
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base,
        datasets=_hub_datasets(recipe),
        tags=tags,
        license=known_licence(recipe.model),
        pipeline_tag=pipeline(recipe.task),
        metrics=list(dict.fromkeys(_HUB_METRICS.get(name, name) for name in data["metrics"].get("test", {}))) or None,
        model_name=f"{recipe.name}-{data['arm']}",
        eval_results=_results(recipe, data),
        **optional,
    )


def kind_of(data: dict[str, Any]) -> str:
    """What a run stored, by its run.json: "adapter" (PEFT's), "full" (a model), "part" (some weights), or "base"."""
    if data["arm"] == BASE:
        return BASE
    stored = data.get("checkpoint_files") or {}
    return "adapter" if "adapter_config.json" in stored else "full" if data["method"] == "full" else "part"


def pipeline(task: str) -> str:
    """The Hub's name of what a model of this task does."""
    return task if task.endswith("classification") else "text-generation"


def hub_base(recipe: Recipe) -> str | None:
    """The Hub's model that the adapters of a recipe fit; None where there is none (local, or made or trained here)."""
    from peft_recipes.embedded.stand_ins import MODELS

    name = recipe.model
    if name.startswith(EMBEDDED):
        row = MODELS.get(name.removeprefix(EMBEDDED))
        return row.hub_id if row else None
    if name == bases.SMALL_CNN or is_place(name):
        return None
    return name if is_repo_id(name) else None


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def known_licence(model: str) -> str | None:
    """The licence of an embedded base, by the Hub's name for it; None where it is not known without asking."""
    from peft_recipes.embedded.stand_ins import MODELS

    row = MODELS.get(model.removeprefix(EMBEDDED)) if model.startswith(EMBEDDED) else None
    return row.licence.lower() if row and row.licence.lower() in _LICENCES else None


def _hub_datasets(recipe: Recipe) -> list[str] | None:
    path = recipe.dataset.path
    there = not path.startswith(EMBEDDED) and not is_place(path) and is_repo_id(path)
    return [path] if there else None


def _results(recipe: Recipe, data: dict[str, Any]) -> list[EvalResult]:
    """The model-index: every metric of every split that was not trained on or chosen by."""
    kind, name = _dataset_names(recipe)
    found = []
    for split, values in data["metrics"].items():
        for metric, value in values.items():
            if split == "validation" or value is None:
                continue
            found.append(
                EvalResult(
                    task_type=pipeline(recipe.task),
                    dataset_type=kind,
                    dataset_name=name,
                    dataset_config=recipe.dataset.name,
                    dataset_split=split,
                    dataset_revision=recipe.dataset.revision,
                    metric_type=_HUB_METRICS.get(metric, metric),
                    metric_name=f"{metric_title(metric)} ({plain(split)})",
                    metric_value=round(value, 6),
                )
            )
    return found


def _dataset_names(recipe: Recipe) -> tuple[str, str]:
    """type and name of the data in the model-index: the Hub's id, a stand-in and what it is, a file's kind and name."""
    from peft_recipes.embedded.stand_ins import DATASETS

    path = recipe.dataset.path
    if path.startswith(EMBEDDED):
        name = path.removeprefix(EMBEDDED)
        told = DATASETS[name].description if name in DATASETS else name
        return f"embedded-{name}", f"{told} (embedded stand-in)"
    if is_place(path):
        name = short(path).removeprefix("./")
        suffix = re.sub(r"\W", "", name.rpartition(".")[2]) if "." in name else "folder"
        return suffix or "folder", name
    return path, path
