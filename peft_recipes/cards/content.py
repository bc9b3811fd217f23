"""The text of a model card, from a run's run.json, recipe and comparison. The layout is in card.md.j2."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Template

from peft_recipes.cards.loading_code import FOLDER, loading_code
from peft_recipes.cards.metadata import hub_base, kind_of, metadata
from peft_recipes.cards.redaction import is_local_path, portable, short
from peft_recipes.embedded.stand_ins import DATASETS, MODELS
from peft_recipes.models import bases
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import to_yaml
from peft_recipes.reporting import details, facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.markdown import escape, fence, pipe_table, table_markdown
from peft_recipes.runs.folder import BASE, Run
from peft_recipes.statistics.conditions import shares_memory
from peft_recipes.statistics.results import comparison_data

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_FEW_STEPS = 1_000
PLOT_TITLES = {
    "difference": "Each arm against full fine-tuning",
    "parameters": "Quality against trained parameters",
    "forgetting": "What tuning made the model forget",
    "loss": "Training loss",
    "rank": "Quality by rank",
}


def run_card(run: Run, recipe: Recipe, comparison: dict[str, Any] | None, plots: list[str]) -> ModelCard:
    """Return a run's card. comparison: the run's, None for a single run. plots: names of the plots in its folder.

    The card has no path of this machine, and text from data or recipe is never markup. Raises ValueError for front
    matter that huggingface_hub rejects.
    """
    local, data = recipe, portable(run.data)
    recipe = Recipe.from_dict(portable(recipe.to_dict()))
    shown = portable(comparison) if comparison else single_run_comparison(Run(run.folder, data), recipe)
    arm = data["arm"]
    is_arm = arm in facts.arms(shown)
    label = facts.label(shown, arm) if is_arm else details.BASE_LABEL
    value = fmt.quality(data["metrics"].get("test", {}).get(recipe.metric), recipe.metric)
    headline = f"The base before tuning: {fmt.metric_title(recipe.metric)} {value} on the test set."
    code = loading_code(recipe, data)
    card_data = metadata(local, data)
    text = _template().render(
        card_data=card_data.to_yaml(),
        title=f"{escape(recipe.title or recipe.name)}: {escape(label)}, seed {data['seed']}",
        headline=escape(sentences.verdict_headline(shown, arm) if is_arm else headline),
        caveats=[escape(line) for line in sentences.caveats(shown, arm)] if is_arm else [],
        compared=comparison is not None,
        table=table_markdown(shown),
        own=_own_metrics(data),
        plots=[(PLOT_TITLES[name], f"plots/{name}.png") for name in plots],
        base=_base_words(recipe),
        code=fence(code.rstrip("\n"), "python") if code else None,
        trained=_trained(recipe, data),
        recipe=fence(to_yaml(recipe.to_dict()).rstrip("\n"), "yaml"),
        limits=_limits(recipe, data, shown),
        ran=_ran(data, shown),
        folder=FOLDER,
        adapter=kind_of(data) == "adapter",
    )
    return ModelCard(text)


@functools.cache
def _template() -> Template:
    return Template(_TEMPLATE.read_text(encoding="utf-8"))  # as `ModelCard.from_template`, which compiles it each time


def single_run_comparison(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Return a comparison of one run, as input for sentences and plots."""
    arm, seed = run.data["arm"], run.data["seed"]
    missing = Run(run.folder, {"status": "failed", "error": None})
    arms = [] if arm == BASE else [arm]
    base = {"status": "ok", "error": None, "metrics": run.metrics} if arm == BASE else None
    return comparison_data(recipe, {(arm, seed): run}, missing, arms, [seed]) | {"base": base}


def _own_metrics(data: dict[str, Any]) -> str:
    """Return this run's figures: one row per metric, one column per split."""
    splits = {split: values for split, values in data["metrics"].items() if values}
    names = dict.fromkeys(name for values in splits.values() for name in values)
    rows = [
        [escape(fmt.metric_title(name)), *(fmt.quality(values.get(name), name, digits=2) for values in splits.values())]
        for name in names
    ]
    return pipe_table(["This run", *map(escape, splits)], rows)


def _base_words(recipe: Recipe) -> str:
    """Return what the base is and how to get it."""
    name = recipe.model
    if name == bases.SMALL_CNN:
        options = recipe.pretraining
        examples = f"{recipe.dataset.pretrain:,} separate examples"
        how = f" ({options.num_train_epochs} epochs on {examples})" if options else ""
        return (
            "The base is a small convolutional network that is not on the Hub. `peft_recipes` trains it on first use, "
            f"as in the recipe below{how}, and caches it. `base_folder` returns its folder."
        )
    if name.startswith(EMBEDDED):
        stand_in = MODELS.get(name.removeprefix(EMBEDDED))
        about = f": {stand_in.description}, from {stand_in.origin}" if stand_in else ""
        hub_id = stand_in.hub_id if stand_in else None
        same = f" It is the same model as `{hub_id}` on the Hub; the adapter fits both." if hub_id else ""
        return (
            f"The base is the embedded stand-in {escape(name)}{escape(about)}. `peft_recipes` builds it on first use "
            f"(`pip install 'peft_recipes[embedded]'`); `base_folder` returns its folder.{same}"
        )
    if is_local_path(name) or name.startswith("./"):
        return (
            f"The base is the local folder {escape(short(name))} of the machine that trained this. It is not part of "
            f"this repository: get a copy from the author, put it at `{short(name).replace('`', '')}` or change the "
            "path in the code below. It must be exactly the same base."
        )
    return f"The base is {escape(hub_base(recipe) or name)} on the Hub, unchanged. It is not part of this repository."


def _training_data(name: str, count: int | None) -> str:
    """The dataset and its number of training examples; None: they are streamed."""
    return f"{name}, streamed" if count is None else f"{name}, {count:,} training examples"


def _trained(recipe: Recipe, data: dict[str, Any]) -> list[str]:
    arm, training, options = recipe.arms.get(data["arm"]), data.get("training"), recipe.training
    if arm is None or not training:
        return []
    counts, rows = data["parameters"], data["rows"]
    values = {
        "Task": data["task"],
        "Data": _training_data(data["dataset"], rows.get("train")),
        "Method": str(data["method"]) + (f", rank {data['rank']}" if data["rank"] else ""),
        "Targets": ", ".join(data["target_modules"] or []),
        "Trained parameters": f"{counts['trainable']:,} of {counts['total']:,}",
        "Learning rate": fmt.learning_rate(data["learning_rate"]),
        "Steps": f"{training['steps']:,} optimiser steps on {training['examples']:,} examples in total"
        + (f", {options['num_train_epochs']:g} epochs" if "num_train_epochs" in options else ""),
        "Batch": f"{options.get('per_device_train_batch_size', 8)} examples",
        "Seed": str(data["seed"]),
        "Training time": fmt.seconds(training["seconds"]),
        "Peak memory": fmt.human_bytes(training["peak_memory_bytes"])
        + (", of a process that trained other runs in turns" if shares_memory(data) else ""),
        "Checkpoint": fmt.human_bytes(data.get("checkpoint_bytes")),
    }
    return [f"{name}: {escape(value)}" for name, value in values.items() if value]


def _limits(recipe: Recipe, data: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """Return what the figures don't show, as far as it applies to the run."""
    lines = []
    for name, table in ((recipe.model, MODELS), *((source.path, DATASETS) for source in recipe.sources)):
        entry = table.get(name.removeprefix(EMBEDDED)) if name.startswith(EMBEDDED) else None
        if entry:
            lines.append(f"{name} is a stand-in: {entry.description}; from {entry.origin}; licence: {entry.licence}.")
    training = data.get("training")
    if training and training["steps"] < _FEW_STEPS:
        lines.append(f"It was trained for only {training['steps']:,} steps: longer training may change the ranking.")
    if comparison["seeds"] == [data["seed"]]:
        lines.append("One seed: the variation between seeds is not known.")
    if "test" in data["rows"]:
        lines.append(
            f"Measured on {data['rows']['test']:,} test examples of the dataset it was trained on; quality on other "
            "data is not known. Only the figures above were measured: not bias, not safety."
        )
    if facts.reference(comparison) is None and kind_of(data) != BASE:
        lines.append("It was trained alone: the quality of full fine-tuning was not measured.")
    return [escape(line) for line in lines]


def _ran(data: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    own = {**comparison, "environment": data["environment"], "rows": data["rows"], "seeds": [data["seed"]]}
    hidden = ("Recipe", "Task", "Model", "Data", "Stand-ins", "Seeds")
    lines = [f"{name}: {escape(value)}" for name, value in details.conditions(own) if name not in hidden]
    version = data["environment"].get("peft_recipes")
    return [*lines, *([f"peft_recipes: {escape(version)}"] if version else [])]
