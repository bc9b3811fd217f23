"""The front matter of a model card: library, base model, datasets, tags, licence, pipeline, metrics."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from peft_recipes.cards.redaction import is_local_path, short
from peft_recipes.embedded.stand_ins import DATASETS, MODELS
from peft_recipes.models import bases
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.mixture import NAMES_APART
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.reporting.facts import plain
from peft_recipes.reporting.formats import metric_title
from peft_recipes.runs.folder import BASE

# Our metrics -> the names on the Hub.
_HUB_METRICS = {
    "macro_f1": "f1",
    "micro_f1": "f1",
    "token_accuracy": "accuracy",
    "entity_f1": "f1",
    "entity_precision": "precision",
    "entity_recall": "recall",
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "openrail")


def metadata(recipe: Recipe, data: dict[str, Any]) -> ModelCardData:
    """Return the front matter of a run's card. data: its run.json.

    base_model is set only if the base is on the Hub, so that a card never names a missing or unrelated repository.
    """
    method, kind = str(data["method"]), kind_of(data)
    adapter, base = kind == "adapter", hub_base(recipe)
    relation = {"base_model_relation": "adapter" if adapter else "finetune"} if base and kind != BASE else {}
    tags = ["peft-recipes", plain(recipe.name)] + ([method.lower()] if kind != BASE else [])
    tags += [f"base_model:adapter:{base}"] if base and adapter else []
    tags += ["embedded-stand-in"] if recipe.uses_stand_ins else []
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base,
        datasets=[source.path for source in recipe.sources if _may_be_on_hub(source.path)] or None,
        tags=tags,
        license=known_licence(recipe.model),
        pipeline_tag=pipeline(recipe.task),
        metrics=list(dict.fromkeys(_HUB_METRICS.get(name, name) for name in data["metrics"].get("test", {}))) or None,
        model_name=f"{recipe.name}-{data['arm']}",
        eval_results=_results(recipe, data),
        **relation,
    )


def kind_of(data: dict[str, Any]) -> str:
    """Return what a run.json's run saved: "adapter" (PEFT), "full" (a model), "part" (some weights) or "base"."""
    if data["arm"] == BASE:
        return BASE
    stored = data.get("checkpoint_files") or {}
    return "adapter" if "adapter_config.json" in stored else "full" if data["method"] == "full" else "part"


def pipeline(task: str) -> str:
    """Return the Hub's pipeline tag for a task."""
    if task == "reward":
        return "text-classification"  # the Hub's tag for reward models
    return task if task.endswith("classification") else "text-generation"


def hub_base(recipe: Recipe) -> str | None:
    """Return the Hub id of a recipe's base; None for a local base or one that is made or trained here."""
    name = recipe.model
    if name.startswith(EMBEDDED):
        stand_in = MODELS.get(name.removeprefix(EMBEDDED))
        return stand_in.hub_id if stand_in else None
    return name if name != bases.SMALL_CNN and _may_be_on_hub(name) else None


def _may_be_on_hub(name: str) -> bool:
    return not name.startswith(EMBEDDED) and not is_local_path(name) and is_repo_id(name)


def is_repo_id(name: str) -> bool:
    """Return whether a name is a valid repository id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def known_licence(model: str) -> str | None:
    """Return the Hub's identifier for the licence of an embedded base; None for any other base."""
    stand_in = MODELS.get(model.removeprefix(EMBEDDED)) if model.startswith(EMBEDDED) else None
    return stand_in.licence.lower() if stand_in and stand_in.licence.lower() in _LICENCES else None


def _results(recipe: Recipe, data: dict[str, Any]) -> list[EvalResult]:
    """Return the model-index: all metrics of all splits but validation, which settings were chosen on."""
    kind, name = _dataset_names(recipe)
    return [
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
        for split, values in data["metrics"].items()
        for metric, value in values.items()
        if split != "validation" and value is not None
    ]


def _dataset_names(recipe: Recipe) -> tuple[str, str]:
    """Return type and name of the dataset in the model-index: a Hub id, a stand-in or a local file."""
    if recipe.datasets is not None:
        kinds, names = zip(*(_dataset_name(source.path) for source in recipe.datasets), strict=True)
        return ", ".join(dict.fromkeys(kinds)), NAMES_APART.join(names)
    return _dataset_name(recipe.dataset.path)


def _dataset_name(path: str) -> tuple[str, str]:
    if path.startswith(EMBEDDED):
        name = path.removeprefix(EMBEDDED)
        description = DATASETS[name].description if name in DATASETS else name
        return f"embedded-{name}", f"{description} (embedded stand-in)"
    if is_local_path(path):
        name = short(path).removeprefix("./")
        suffix = re.sub(r"\W", "", name.rpartition(".")[2]) if "." in name else "folder"
        return suffix or "folder", name
    return path, path
