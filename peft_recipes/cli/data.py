"""Commands that look at data before anything is trained: data, new."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from peft_recipes.cli.common import (
    RECIPES,
    Embedded,
    Json,
    RecipeArgument,
    Set,
    Trust,
    command,
    load,
    show,
    split_names,
)
from peft_recipes.errors import RecipeError


@command(RECIPES, "data")
def data_of(
    recipe: RecipeArgument,
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006  (typer reads it, nobody changes it)
    examples: Annotated[int, Option("--examples", metavar="N", min=0, help="Show the first N training examples.")] = 3,
    as_json: Json = False,
) -> None:
    """Show what a recipe trains on: examples as the model sees them, lengths, classes, what is left out."""
    from peft_recipes.cli.output.data import show_data
    from peft_recipes.inspection.summary import look

    looked = look(load(recipe, embedded, changes), examples)
    show(as_json, looked, lambda: show_data(looked), ensure_ascii=False)


@command(RECIPES)
def new(
    model: Annotated[
        str, Option("--model", metavar="MODEL", help="Name the base: a Hub id, a folder, embedded:NAME.")
    ] = "",
    dataset: Annotated[
        str, Option("--dataset", metavar="DATA", help="Name the data: a Hub id, a file or folder, embedded:NAME.")
    ] = "",
    output: Annotated[
        str, Option("--output", metavar="FILE.py", help="Write the recipe to this file (default: by model and data).")
    ] = "",
    task: Annotated[str, Option("--task", help="Set the task instead of choosing it.")] = "",
    data_format: Annotated[
        str, Option("--format", help="Set the format of SFT examples instead of detecting it.")
    ] = "",
    text: Annotated[
        str, Option("--text", metavar="A[,B]", help="Name the column of texts, or the two of a pair.")
    ] = "",
    label: Annotated[str, Option("--label", metavar="COLUMN", help="Name the column of labels.")] = "",
    prompt: Annotated[str, Option("--prompt", metavar="COLUMN", help="Name the column of prompts or inputs.")] = "",
    completion: Annotated[str, Option("--completion", metavar="COLUMN", help="Name the column of answers.")] = "",
    dataset_name: Annotated[str, Option("--dataset-name", help="Choose a configuration of a Hub dataset.")] = "",
    train_split: Annotated[str, Option("--train-split", help="Name the split to train on.")] = "",
    max_length: Annotated[
        int, Option("--max-length", metavar="N", min=0, help="Set the most tokens of an example.")
    ] = 0,
    batch_size: Annotated[int, Option("--batch-size", metavar="N", min=0, help="Set the batch of a device.")] = 0,
    ranks: Annotated[str, Option("--ranks", metavar="16,64", help="Set the ranks of the LoRA arms.")] = "",
    changes: Set = [],  # noqa: B006
    embedded: Annotated[
        bool,
        Option("--embedded", help="Add stand-ins for --embedded runs; one replaces a --model or --dataset left out."),
    ] = False,
    trust_remote_code: Trust = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a recipe for a model and a dataset: task, columns, length, arms and batch, each with its reason."""
    from peft_recipes.cli.output.data import show_draft
    from peft_recipes.drafting import stand_ins
    from peft_recipes.drafting.draft import Request, draft
    from peft_recipes.drafting.finding import Asked

    if embedded:
        model = model or stand_ins.stand_in_model(task or None)
        dataset = dataset or stand_ins.stand_in_data(model, trust_remote_code)
    if missing := [flag for flag, value in (("--model", model), ("--dataset", dataset)) if not value]:
        raise RecipeError(f"Name {' and '.join(missing)}: a Hub id, a local path or embedded:NAME; or add --embedded.")
    asked = Asked(task or None, data_format or None, split_names(text) or [], label or None, prompt or None,
                  completion or None)  # fmt: skip
    made = draft(Request(
        model, dataset, Path(output) if output else None, dataset_name or None, train_split or None, asked,
        max_length or None, batch_size or None, _ranks(ranks), changes, trust_remote_code, embedded, overwrite,
    ))  # fmt: skip
    show(as_json, made.to_dict(), lambda: show_draft(made), ensure_ascii=False)


def _ranks(text: str) -> list[int]:
    try:
        ranks = [int(rank) for rank in split_names(text) or ()]
    except ValueError:
        ranks = [0]
    if any(rank < 1 for rank in ranks):
        raise RecipeError(f"--ranks {text}: expected whole numbers above 0 with commas between them, as in 16,64.")
    return ranks
