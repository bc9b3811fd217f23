"""Commands that find a learning rate, a rank and target modules: scan, spectrum, extract."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from peft_recipes.cli.common import (
    ADAPTERS,
    RECIPES,
    Address,
    Arms,
    Embedded,
    Json,
    On,
    Output,
    Overwrite,
    RecipeArgument,
    Seed,
    Set,
    Wait,
    command,
    load,
    say,
    show,
    split_names,
)

FullRun = Annotated[Path, Argument(metavar="RUN", help="Name the folder of a full fine-tuning run.")]


@command(RECIPES)
def scan(
    recipe: RecipeArgument,
    learning_rates: Annotated[
        str,
        Option(
            "--learning-rates",
            metavar="LOW:HIGH:COUNT",
            help="Try this range, or a list 1e-4,3e-4 (default: a few around each arm's own).",
        ),
    ] = "",
    ranks: Annotated[str, Option("--ranks", metavar="2,4,8", help="Try adapters at these ranks.")] = "",
    arms: Arms = "",
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006  (typer reads it, nobody changes it)
    budget: Annotated[str, Option("--budget", metavar="10m", help="Limit the total time: 90s, 10m, 1.5h.")] = "10m",
    seed: Seed = 0,
    output: Output = Path("adapters"),
    overwrite: Overwrite = False,
    wait: Wait = False,
    on: On = "local",
    address: Address = "",
    jobs: Annotated[
        str, Option("--jobs", metavar="N", help="Train N arms at a time, or auto: as many as fit (the default).")
    ] = "",
    as_json: Json = False,
) -> None:
    """Find the learning rate (and rank) of each arm by short runs within a budget, by validation loss."""
    from peft_recipes.comparison.places import check_place
    from peft_recipes.distributed.jobs import read_jobs
    from peft_recipes.search.candidates import read_learning_rates, read_ranks, read_seconds

    # Parsed before anything is loaded, so that a typo is reported at once.
    check_place(on, address or None)
    at_a_time = read_jobs(jobs) if jobs else None
    rates, chosen_ranks, seconds = read_learning_rates(learning_rates), read_ranks(ranks), read_seconds(budget)
    loaded = load(recipe, embedded, changes)
    from rich.console import Console

    from peft_recipes.reporting.scan_report import render_scan, too_small
    from peft_recipes.search.scan import scan as scan_arms

    options = {"seed": seed, "output": output, "overwrite": overwrite, "wait": wait, "on_trial": _say_run}
    options |= {"budget": seconds, "gone": _seconds_since_start(), "on": on, "address": address or None}
    options["jobs"] = at_a_time
    result = scan_arms(loaded, rates, split_names(arms), chosen_ranks, **options)
    show(as_json, result.data, lambda: render_scan(result.data, Console()))
    if not as_json and result.best:
        print(f"\nWinners: {result.recipe} (peft-recipes compare {result.recipe})")
    if not result.best:
        if as_json or not too_small(result.data):
            say(too_small(result.data) or "No arm has a best learning rate. Give it a larger --budget, or lower "
                "--learning-rates.")  # fmt: skip
        raise typer.Exit(1)


def _seconds_since_start() -> float:
    """Seconds since this process started: importing the libraries counts towards the budget."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _say_run(arm: str, run: dict[str, Any], number: int, total: int) -> None:
    last = run["validation"][-1] if run["validation"] else None
    loss = f"validation loss {last['loss']:.4g} after {last['step']} steps" if last and last["loss"] else "no loss"
    ended = {"whole": "", "stopped": ", stopped early"}.get(run["ended"], f", {run['ended']}")
    ended += f": {run['error']}" if run["ended"] == "failed" else ""
    say(f"{number}/{total} {arm} {run['learning_rate']:g}: {loss}{ended}")


@command(ADAPTERS)
def spectrum(run: FullRun, as_json: Json = False) -> None:
    """Show what full fine-tuning changed in each module, and how much of it an adapter of each rank could represent."""
    from rich.console import Console

    from peft_recipes.reporting.spectrum_report import render_spectrum
    from peft_recipes.search.spectra import FILE
    from peft_recipes.search.spectra import spectrum as compute_spectrum

    data = compute_spectrum(run)
    show(as_json, data, lambda: render_spectrum(data, Console()))
    if not as_json:
        print(f"\n{run / FILE}")


@command(ADAPTERS)
def extract(
    run: FullRun,
    rank: Annotated[int, Option("--rank", metavar="R", help="Set the rank of the adapter.")],
    output: Annotated[Path, Option("--output", metavar="DIR", help="Write the adapter to this folder.")],
    targets: Annotated[
        str, Option("--targets", metavar="GROUP", help="Extract all, attention, mlp, or modules by name: A,B.")
    ] = "all",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Extract a LoRA adapter from a full fine-tune, and compare it with the full run and with trained LoRA."""
    from rich.console import Console

    from peft_recipes.models.architecture_table import GROUPS
    from peft_recipes.reporting.spectrum_report import render_extraction
    from peft_recipes.search.extraction import extract as extract_adapter

    chosen = targets if targets in ("all", *GROUPS) else split_names(targets) or "all"
    data = extract_adapter(run, rank, output, targets=chosen, overwrite=overwrite)
    show(as_json, data, lambda: render_extraction(data, Console()))
    if not as_json:
        print(f"\n{output}")
