"""`main(recipe)`: run a recipe module as a script, alone or under `accelerate launch`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from peft_recipes.cli.common import (
    ArmName,
    Benchmarks,
    Embedded,
    Json,
    Output,
    Overwrite,
    Resume,
    Seed,
    Set,
    Wait,
    handle_errors,
    with_benchmarks,
)
from peft_recipes.recipe.recipe import Recipe


def main(recipe: Recipe) -> None:
    """Train one arm of the recipe with the options of `peft-recipes train`: `python recipes/NAME.py --arm lora`."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @script.command(help=f"Train one arm ({', '.join(recipe.arms)}) of {recipe.title or recipe.name} once.")
    @handle_errors
    def run(
        arm: ArmName,
        seed: Seed = 0,
        embedded: Embedded = False,
        changes: Set = [],  # noqa: B006
        benchmarks: Benchmarks = "",
        output: Output = Path("adapters"),
        resume: Resume = False,
        overwrite: Overwrite = False,
        wait: Wait = False,
        as_json: Json = False,
    ) -> None:
        from peft_recipes.catalog.changes import changed
        from peft_recipes.cli.recipes import train_arm

        options = {"output": output, "resume": resume, "overwrite": overwrite, "wait": wait}
        train_arm(changed(recipe, embedded, with_benchmarks(changes, benchmarks)), arm, seed, as_json, **options)

    script(sys.argv[1:])
