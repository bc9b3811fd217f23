"""The commands on recipes: list, plan, train, compare, report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_recipes.cli.common import (
    RECIPES,
    Arms,
    Embedded,
    Json,
    Output,
    Overwrite,
    RecipeArgument,
    Resume,
    Set,
    Wait,
    app,
    friendly,
    listed_names,
    load,
    say,
)
from peft_recipes.errors import RecipeError


@app.command("list", rich_help_panel=RECIPES)
@friendly
def list_recipes(as_json: Json = False) -> None:
    """The recipes that come with peft-recipes."""
    from peft_recipes.catalog.recipes import recipe_files
    from peft_recipes.cli.output.plans import show_recipes

    recipes = [load(name, False, []) for name in recipe_files()]
    if as_json:
        facts = [{"name": r.name, "title": r.title, "task": r.task, "model": r.model, "dataset": r.dataset.path,
                  "arms": list(r.arms), "embedded": bool(r.embedded)} for r in recipes]  # fmt: skip
        print(json.dumps(facts, indent=1))
    else:
        show_recipes(recipes)


@app.command(rich_help_panel=RECIPES)
@friendly
def plan(
    recipe: RecipeArgument,
    arms: Arms = "",
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006  (typer reads it, nobody changes it)
    trial: Annotated[bool, typer.Option("--trial", help="Load the weights and time three steps of each arm.")] = False,
    processes: Annotated[int, typer.Option("--processes", metavar="N", min=1, help="As one of N processes.")] = 1,
    config: Annotated[
        str, typer.Option("--config", metavar="CONFIG", help="How they share: ddp, fsdp2, deepspeed_zero2, or a file.")
    ] = "",
    per_process_memory: Annotated[
        str, typer.Option("--per-process-memory", metavar="80GB", help="Of each process (default: this machine's).")
    ] = "",
    as_json: Json = False,
) -> None:
    """Parameters, targets, checkpoint size, steps and memory of every arm, before anything is loaded."""
    from peft_recipes.cli.output.plans import show_plan
    from peft_recipes.planning.plan import plan as make_plan
    from peft_recipes.planning.scaling import planned_spread

    spread = planned_spread(processes, config, per_process_memory)
    made = make_plan(load(recipe, embedded, changes), listed_names(arms), trial=trial, spread=spread)
    if as_json:
        print(json.dumps(made, indent=1))
    else:
        show_plan(made)


@app.command(rich_help_panel=RECIPES)
@friendly
def train(
    recipe: RecipeArgument,
    arm: Annotated[str, typer.Option("--arm", help="The arm to train, or 'base' to evaluate the untrained base.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of head, adapter, order and dropout.")] = 0,
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006
    output: Output = Path("adapters"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Train one arm once, here in this process."""
    _train(load(recipe, embedded, changes), arm, seed, as_json, output=output, resume=resume, overwrite=overwrite,
           wait=wait)  # fmt: skip


def _train(recipe: Any, arm: str, seed: int, as_json: bool, *, resume: bool, overwrite: bool, **options: Any) -> None:
    from peft_recipes.cli.output.results import show_run
    from peft_recipes.distributed import processes
    from peft_recipes.training.run import train as train_arm

    if resume and overwrite:
        raise RecipeError("--resume and --overwrite contradict each other; choose one.")
    try:
        quiet = not sys.stderr.isatty()
        if not quiet:
            os.environ.pop("TQDM_DISABLE", None)
        run = train_arm(recipe, arm, seed=seed, resume=resume, overwrite=overwrite, quiet=quiet, **options)
    except (RecipeError, processes.OtherRankFailed):
        raise
    except Exception as error:  # a run that failed midway: its run.json has the traceback
        where = f" in process {processes.rank()}" if processes.count() > 1 else ""
        say(f"The run failed{where}: {type(error).__name__}: {processes.error_message(error)}")
        raise typer.Exit(1) from None
    if not processes.is_rank_zero():
        return
    if as_json:
        print(json.dumps(run.data, indent=1))
    else:
        show_run(run)


@app.command(rich_help_panel=RECIPES)
@friendly
def compare(
    recipe: RecipeArgument,
    arms: Arms = "",
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,2", help="Seeds; every arm runs with each.")] = "0",
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006
    output: Output = Path("adapters"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train finished runs anew.")] = False,
    wait: Wait = False,
    launch: Annotated[
        str,
        typer.Option("--launch", metavar="CONFIG", help="Each run under accelerate: ddp, fsdp2, or a file."),
    ] = "",
    processes: Annotated[
        int, typer.Option("--processes", metavar="N", min=0, help="Of each launched run (default: the config's).")
    ] = 0,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", min=1, help="So many runs at a time, a GPU each, or sharing the CPU.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Train several arms side by side, each run in a fresh process, and report them with intervals."""
    from peft_recipes.cli.output.progress import shown_progress
    from peft_recipes.cli.output.results import show_comparison
    from peft_recipes.comparison.compare import compare as compare_arms

    chosen = load(recipe, embedded, changes)
    with shown_progress() as on_progress:
        made = compare_arms(
            chosen,
            listed_names(arms),
            _seeds(seeds),
            output=output,
            overwrite=overwrite,
            wait=wait,
            launch=launch or None,
            processes=processes or None,
            jobs=jobs,
            asked={"recipe": recipe, "embedded": embedded, "changes": changes, "arms": listed_names(arms),
                   "output": str(output)},
            on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(made.data, indent=1))
    else:
        show_comparison(made)
    if made.failed:
        say(f"Failed: {', '.join(made.failed)}. The reason stands in the table and in each run's run.json.")
        raise typer.Exit(1)


def _seeds(listed: str) -> list[int]:
    try:
        return [int(seed) for seed in listed.split(",")]
    except ValueError:
        raise RecipeError(f"--seeds {listed}: expected whole numbers with commas between them, as in 0,1,2.") from None


@app.command(rich_help_panel=RECIPES)
@friendly
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a comparison.")], as_json: Json = False
) -> None:
    """Show a comparison again, and write its report and its runs' cards anew."""
    from peft_recipes.cards.write import write_cards
    from peft_recipes.cli.output.results import show_comparison
    from peft_recipes.comparison.comparison import read_comparison
    from peft_recipes.reporting.write import write_reports
    from peft_recipes.runs.files import check_output

    made = read_comparison(folder)
    if as_json:
        print(json.dumps(made.data, indent=1))
        return
    check_output(made.folder, "The report goes beside its comparison: ")
    write_reports(made.data, made.folder)
    write_cards(made.data, made.folder)
    show_comparison(made)


def train_app(recipe: Any, arguments: list[str]) -> None:
    """`python recipes/NAME.py --arm lora`: the flags of `peft-recipes train`, for a recipe that is at hand."""
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @single.command(help=f"{recipe.title or recipe.name}: train one arm ({', '.join(recipe.arms)}) once.")
    @friendly
    def run(
        arm: Annotated[str, typer.Option("--arm", help="The arm to train, or 'base'.")],
        seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
        embedded: Embedded = False,
        changes: Set = [],  # noqa: B006
        output: Output = Path("adapters"),
        resume: Resume = False,
        overwrite: Overwrite = False,
        wait: Wait = False,
        as_json: Json = False,
    ) -> None:
        from peft_recipes.catalog.changes import changed

        _train(changed(recipe, embedded, changes), arm, seed, as_json, output=output, resume=resume,
               overwrite=overwrite, wait=wait)  # fmt: skip

    single(arguments)
