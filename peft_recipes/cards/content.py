"""What a card says, from a run's run.json, its recipe and its comparison; the template only lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from peft_recipes.cards.loading_code import PLACE, loading_code
from peft_recipes.cards.metadata import hub_base, kind_of, metadata
from peft_recipes.cards.redaction import is_place, portable, short
from peft_recipes.models import bases
from peft_recipes.recipe.dataset import EMBEDDED
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import to_yaml
from peft_recipes.reporting import details, facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.markdown import escape, fence, table_markdown
from peft_recipes.runs.folder import BASE, Run

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_SHORT_STEPS = 1_000
PLOT_TITLES = {
    "difference": "Each arm against full fine-tuning",
    "parameters": "Quality against trained parameters",
    "forgetting": "What tuning made the model forget",
    "loss": "Training loss",
    "rank": "Quality by rank",
}


def run_card(
    run: Run,
    recipe: Recipe,
    comparison: dict[str, Any] | None,
    plots: list[str],
) -> ModelCard:
    """A run's card. comparison: that it belongs to, None where it was trained alone. plots: names of those beside it.

    No path of this machine is in it, and no text from data or recipe can be markup. Raises ValueError where
    huggingface_hub's own check of the front matter refuses it.
    """
    local, data = recipe, portable(run.data)
    recipe = Recipe.from_dict(portable(recipe.to_dict()))
    shown = portable(comparison) if comparison else alone(Run(run.folder, data), recipe)
    arm = data["arm"]
    told = arm in facts.arms(shown)
    label = facts.label(shown, arm) if told else "Base, untuned"
    code = loading_code(recipe, data)
    card = ModelCard.from_template(
        metadata(local, data),
        template_path=str(_TEMPLATE),
        title=f"{escape(recipe.title or recipe.name)}: {escape(label)}, seed {data['seed']}",
        headline=escape(sentences.verdict_headline(shown, arm)) if told else _base_headline(data, recipe),
        caveats=[escape(line) for line in sentences.caveats(shown, arm)] if told else [],
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
        place=PLACE,
        adapter=kind_of(data) == "adapter",
    )
    return card


def alone(run: Run, recipe: Recipe) -> dict[str, Any]:
    """A comparison of one run, for what draws and words comparisons."""
    from peft_recipes.statistics.results import comparison_data

    arm, seed = run.data["arm"], run.data["seed"]
    missing = Run(run.folder, {"status": "failed", "error": None})
    arms = [] if arm == BASE else [arm]
    return comparison_data(recipe, {(arm, seed): run}, missing, arms, [seed]) | {"base": _base_row(run)}


def _base_row(run: Run) -> dict[str, Any] | None:
    if run.data["arm"] != BASE:
        return None
    return {"status": "ok", "error": None, "metrics": run.metrics}


def _base_headline(data: dict[str, Any], recipe: Recipe) -> str:
    reached = fmt.quality(data["metrics"].get("test", {}).get(recipe.metric), recipe.metric)
    return escape(f"The base as it was before any tuning: {fmt.metric_title(recipe.metric)} {reached} on the test set.")


def _own_metrics(data: dict[str, Any]) -> str:
    """This very run's figures: a row a metric, a column a split."""
    splits = [split for split, values in data["metrics"].items() if values]
    names = list(dict.fromkeys(name for split in splits for name in data["metrics"][split]))
    head = ["This run", *(escape(split) for split in splits)]
    lines = ["| " + " | ".join(head) + " |", "|:---|" + "---:|" * len(splits)]
    for name in names:
        values = [fmt.quality(data["metrics"][split].get(name), name, digits=2) for split in splits]
        lines.append("| " + " | ".join([escape(fmt.metric_title(name)), *values]) + " |")
    return "\n".join(lines)


def _base_words(recipe: Recipe) -> str:
    """What the base is and how to get it."""
    from peft_recipes.embedded.stand_ins import MODELS

    name = recipe.model
    if name == bases.SMALL_CNN:
        made = recipe.pretraining
        how = f"{made.num_train_epochs} epochs on {recipe.dataset.pretrain:,} rows put aside for it" if made else ""
        return (
            "The base is a small convolutional network that no Hub has: `peft_recipes` trains it here first, as the "
            f"recipe below says ({how}), and keeps it. `base_folder` gives its folder."
        )
    if name.startswith(EMBEDDED):
        row = MODELS.get(name.removeprefix(EMBEDDED))
        told = f": {row.description}, from {row.origin}" if row else ""
        fits = f" It is the Hub's `{row.hub_id}`, which the adapter fits as well." if row and row.hub_id else ""
        return (
            f"The base is the embedded stand-in {escape(name)}{escape(told)}. `peft_recipes` makes it on first use "
            f"(`pip install 'peft_recipes[embedded]'`); `base_folder` gives its folder.{fits}"
        )
    if is_place(name) or name.startswith("./"):
        return (
            f"The base is a local folder, {escape(short(name))}, of the machine that trained this. It is not in here: "
            f"ask whoever trained it, put your copy at `{short(name).replace('`', '')}` or change the code below. It "
            "must be the very same base."
        )
    return f"The base is {escape(hub_base(recipe) or name)} on the Hub, as it is: nothing of it is in here."


def _trained(recipe: Recipe, data: dict[str, Any]) -> list[str]:
    arm, training, options = recipe.arms.get(data["arm"]), data.get("training"), recipe.training
    if arm is None or not training:
        return []
    counts, rows = data["parameters"], data["rows"]
    told = {
        "Task": data["task"],
        "Data": f"{data['dataset']}, {rows['train']:,} training examples",
        "Method": f"{data['method']}" + (f", rank {data['rank']}" if data["rank"] else ""),
        "Targets": ", ".join(data["target_modules"] or []),
        "Trained parameters": f"{counts['trainable']:,} of {counts['total']:,}",
        "Learning rate": f"{fmt.learning_rate(data['learning_rate'])}, this arm's own",
        "Steps": f"{training['steps']:,} optimiser steps on {training['examples']:,} examples in all"
        + (f", {options['num_train_epochs']:g} epochs" if "num_train_epochs" in options else ""),
        "Batch": f"{options.get('per_device_train_batch_size', 8)} examples",
        "Seed": str(data["seed"]),
        "Training time": fmt.seconds(training["seconds"]),
        "Peak memory": fmt.human_bytes(training["peak_memory_bytes"]),
        "Checkpoint": fmt.human_bytes(data.get("checkpoint_bytes")),
    }
    return [f"{name}: {escape(value)}" for name, value in told.items() if value]


def _limits(recipe: Recipe, data: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """What the figures do not show; each line only where it holds."""
    from peft_recipes.embedded.stand_ins import DATASETS, MODELS

    told = []
    for name, table in ((recipe.model, MODELS), (recipe.dataset.path, DATASETS)):
        row = table.get(name.removeprefix(EMBEDDED)) if name.startswith(EMBEDDED) else None
        if row:
            told.append(f"{name} is a stand-in: {row.description}; made from {row.origin}; licence: {row.licence}.")
    training = data.get("training")
    if training and training["steps"] < _SHORT_STEPS:
        told.append(f"It was trained for {training['steps']:,} steps, which is short: more may change the order.")
    if comparison["seeds"] == [data["seed"]]:
        told.append("One seed: what another would have given is not known.")
    if "test" in data["rows"]:
        told.append(
            f"Measured on {data['rows']['test']:,} test examples of the same data as it was trained on; how it does on "
            "other data is not known. Nothing was looked at but the figures above: not bias, not safety."
        )
    if facts.reference(comparison) is None and kind_of(data) != BASE:
        told.append("It was trained alone: what full fine-tuning would have reached was not measured.")
    return [escape(line) for line in told]


def _ran(data: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    own = {**comparison, "environment": data["environment"], "rows": data["rows"], "seeds": [data["seed"]]}
    hidden = ("Recipe", "Task", "Model", "Data", "Stand-ins", "Seeds")
    told = [f"{name}: {escape(value)}" for name, value in details.conditions(own) if name not in hidden]
    version = data["environment"].get("peft_recipes")
    return [*told, *([f"peft_recipes: {escape(version)}"] if version else [])]
