"""Commands that work on recipes: list, plan, train, compare, report, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from peft_recipes.cli.common import (
    RECIPES,
    Address,
    ArmName,
    Arms,
    Benchmarks,
    Embedded,
    Json,
    On,
    Output,
    Overwrite,
    RecipeArgument,
    Resume,
    Seed,
    Set,
    Wait,
    command,
    load,
    quiet_without_terminal,
    say,
    show,
    split_names,
    with_benchmarks,
)
from peft_recipes.distributed.jobs import read_jobs
from peft_recipes.distributed.quiet import skip_bitsandbytes
from peft_recipes.errors import RecipeError


@command(RECIPES, "list")
def list_recipes(as_json: Json = False) -> None:
    """List the recipes that come with peft-recipes."""
    from peft_recipes.catalog.recipes import recipe_files
    from peft_recipes.cli.output.plans import show_recipes

    recipes = [load(name, False, []) for name in recipe_files()]
    rows = [
        {
            **{key: getattr(recipe, key) for key in ("name", "title", "task", "model")},
            "dataset": recipe.data_name,
            "arms": list(recipe.arms),
            "embedded": bool(recipe.embedded),
        }
        for recipe in recipes
    ]
    show(as_json, rows, lambda: show_recipes(recipes))


@command(RECIPES)
def plan(
    recipe: RecipeArgument,
    arms: Arms = "",
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006  (typer reads it, nobody changes it)
    benchmarks: Benchmarks = "",
    trial: Annotated[bool, Option("--trial", help="Load the weights and time three steps of each arm.")] = False,
    processes: Annotated[int, Option("--processes", metavar="N", min=1, help="Plan for one of N processes.")] = 1,
    config: Annotated[
        str, Option("--config", metavar="CONFIG", help="Choose their strategy: ddp, fsdp2, deepspeed_zero2, or a file.")
    ] = "",
    per_process_memory: Annotated[
        str, Option("--per-process-memory", metavar="80GB", help="Set their memory (default: this machine's).")
    ] = "",
    power: Annotated[
        float | None, Option("--power", metavar="1", help="Say how many seeds a verdict within this margin takes.")
    ] = None,
    output: Annotated[Path, Option("--output", metavar="DIR", help="Find --power's pilot runs there.")] = Path(
        "adapters"
    ),
    as_json: Json = False,
) -> None:
    """Show each arm's parameters, targets, checkpoint size, steps and memory without loading the model."""
    from peft_recipes.cli.output.plans import show_plan
    from peft_recipes.planning.plan import plan as make_plan
    from peft_recipes.planning.scaling import planned_spread

    spread = planned_spread(processes, config, per_process_memory)
    options = {"trial": trial, "spread": spread, "power": power, "output": output}
    result = make_plan(load(recipe, embedded, with_benchmarks(changes, benchmarks)), split_names(arms), **options)
    show(as_json, result, lambda: show_plan(result))


@command(RECIPES)
def train(
    recipe: RecipeArgument,
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
    """Train one arm once, in this process."""
    options = {"output": output, "resume": resume, "overwrite": overwrite, "wait": wait}
    train_arm(load(recipe, embedded, with_benchmarks(changes, benchmarks)), arm, seed, as_json, **options)


def train_arm(recipe: Any, arm: str, seed: int, as_json: bool, **options: Any) -> None:
    """Train and print the run; the body of `peft-recipes train` and of a recipe module run as a script."""
    from peft_recipes.cli.output.results import show_run
    from peft_recipes.distributed import processes
    from peft_recipes.training.run import train as run_training

    if options["resume"] and options["overwrite"]:
        raise RecipeError("--resume and --overwrite contradict each other; choose one.")
    quiet = quiet_without_terminal()
    try:
        run = run_training(recipe, arm, seed=seed, quiet=quiet, **options)
    except (RecipeError, processes.OtherRankFailed):
        raise
    except Exception as error:  # the run failed midway: run.json holds the traceback
        where = f" in process {processes.rank()}" if processes.count() > 1 else ""
        say(f"The run failed{where}: {type(error).__name__}: {processes.error_message(error)}")
        raise typer.Exit(1) from None
    if not processes.is_rank_zero():
        return
    show(as_json, run.data, lambda: show_run(run))
    if run.failed_checks:
        names = ", ".join(run.failed_checks)
        say(f"The run is kept, but a check failed after training: {names}. run.json has the reason.")
        raise typer.Exit(1)


@command(RECIPES)
def compare(
    recipe: RecipeArgument,
    arms: Arms = "",
    seeds: Annotated[str, Option("--seeds", metavar="0,1,2", help="Train every arm with each seed.")] = "0",
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006
    benchmarks: Benchmarks = "",
    output: Output = Path("adapters"),
    overwrite: Annotated[bool, Option("--overwrite", help="Train finished runs again.")] = False,
    wait: Wait = False,
    launch: Annotated[
        str, Option("--launch", metavar="CONFIG", help="Train each run under accelerate: ddp, fsdp2, or a file.")
    ] = "",
    processes: Annotated[
        int, Option("--processes", metavar="N", min=0, help="Launch N processes per run (default: the config's).")
    ] = 0,
    jobs: Annotated[
        str,
        Option("--jobs", metavar="N", help="Train N runs at a time, or auto: a GPU each, or sharing one or the CPU."),
    ] = "1",
    measure: Annotated[
        bool, Option("--measure", help="Take times and memory again after the runs, alone, the arms in turns.")
    ] = False,
    share_base: Annotated[
        bool, Option("--share-base", help="Train the adapters' further seeds together, on one base in one process.")
    ] = False,
    on: On = "local",
    address: Address = "",
    chunks: Annotated[
        int, Option("--chunks", metavar="N", help="Let the arms take turns, each for 1/N of its steps at a time.")
    ] = 1,
    drop: Annotated[
        bool, Option("--drop", help="Stop arms that are surely behind on validation (with --chunks, default 8).")
    ] = False,
    until_decided: Annotated[
        bool, Option("--until-decided", help="Add seeds until every arm has a verdict, by a plan made beforehand.")
    ] = False,
    budget: Annotated[
        str, Option("--budget", metavar="2h", help="Start no seed that would not end within this time.")
    ] = "",
    max_seeds: Annotated[
        int, Option("--max-seeds", metavar="N", min=0, help="Plan for N seeds at most (default: 10).")
    ] = 0,
    watch: Annotated[
        bool, Option("--watch", help="Serve the report on this machine while runs are trained; it refreshes itself.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train several arms, each run in a fresh process, and report them side by side with intervals."""
    from peft_recipes.comparison.places import check_place

    # Before anything is loaded, so that a typo is reported at once.
    check_place(on, address or None)
    if chunks < 1:
        raise RecipeError(f"--chunks {chunks}: expected a number of chunks of 1 or more, as in --chunks 8.")
    at_a_time = read_jobs(jobs)
    until = _until(until_decided, budget, max_seeds)
    from peft_recipes.cli.output.progress import progress_bars
    from peft_recipes.cli.output.results import show_comparison
    from peft_recipes.comparison.compare import compare as compare_arms

    changes = with_benchmarks(changes, benchmarks)
    loaded, names = load(recipe, embedded, changes), split_names(arms)
    asked = {"recipe": recipe, "embedded": embedded, "changes": changes, "arms": names, "output": str(output)}
    asked |= {"on": on, "address": address}
    options = {"output": output, "overwrite": overwrite, "wait": wait, "jobs": at_a_time, "asked": asked}
    options |= {"launch": launch or None, "processes": processes or None, "measure": measure, "until": until}
    options |= {"share_base": share_base}
    options |= {"on": on, "address": address or None, "chunks": chunks, "drop": drop, "watch": watch}
    with progress_bars() as on_progress:
        comparison = compare_arms(loaded, names, _seeds(seeds), on_progress=on_progress, **options)
    show(as_json, comparison.data, lambda: show_comparison(comparison))
    if comparison.failed:
        say(f"Failed: {', '.join(comparison.failed)}. The table and each run's run.json give the reason.")
    if comparison.failed_checks:
        names = ", ".join(comparison.failed_checks)
        say(f"Kept, but a check failed after training: {names}. The lines below the table give the reason.")
    if comparison.failed or comparison.failed_checks:
        raise typer.Exit(1)


def _until(until_decided: bool, budget: str, max_seeds: int) -> Any:
    """What --until-decided, --budget and --max-seeds ask for; None for a fixed number of seeds."""
    if not until_decided:
        if budget or max_seeds:
            flag = f"--budget {budget}" if budget else f"--max-seeds {max_seeds}"
            raise RecipeError(f"{flag} limits how many seeds --until-decided adds: add --until-decided.")
        return None
    from peft_recipes.comparison.until_decided import MOST_SEEDS, Until
    from peft_recipes.search.candidates import read_seconds

    return Until(max_seeds or MOST_SEEDS, read_seconds(budget) if budget else None)


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise RecipeError(f"--seeds {text}: expected whole numbers with commas between them, as in 0,1,2.") from None


@command(RECIPES)
def report(
    folder: Annotated[Path, Argument(metavar="DIR", help="Name the folder of a comparison.")], as_json: Json = False
) -> None:
    """Show a comparison, and rewrite its report and its runs' cards; of a provisional one there are no cards."""
    skip_bitsandbytes()
    from peft_recipes.cards.write import write_cards
    from peft_recipes.cli.output.results import show_comparison
    from peft_recipes.comparison.comparison import read_comparison
    from peft_recipes.reporting.write import write_reports
    from peft_recipes.runs.files import check_output
    from peft_recipes.runs.lock import is_locked

    comparison = read_comparison(folder)
    in_progress = comparison.provisional and is_locked(folder)
    if comparison.provisional and not in_progress:  # its process was killed
        comparison.data["provisional"] |= {"expected_seconds": None, "expected_end": None, "interrupted": True}
    if not as_json and not in_progress:
        check_output(comparison.folder, "The report is written to the comparison's folder: ")
        write_reports(comparison.data, comparison.folder)
        if not comparison.provisional:
            write_cards(comparison.data, comparison.folder)
    show(as_json, comparison.data, lambda: show_comparison(comparison))


@command(RECIPES)
def methods(as_json: Json = False) -> None:
    """List the methods that --arms takes on any recipe: defaults, starting learning rates, limits, papers."""
    skip_bitsandbytes()
    from peft_recipes.arms.methods import table
    from peft_recipes.cli.output.plans import show_methods

    show(as_json, table(), lambda: show_methods(table()), ensure_ascii=False)
