"""The commands that find a rate, a rank and targets: scan, spectrum, extract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_recipes.cli.common import (
    ADAPTERS,
    RECIPES,
    Arms,
    Embedded,
    Json,
    Output,
    Overwrite,
    RecipeArgument,
    Set,
    Wait,
    app,
    friendly,
    listed_names,
    load,
    say,
)


@app.command(rich_help_panel=RECIPES)
@friendly
def scan(
    recipe: RecipeArgument,
    learning_rates: Annotated[
        str,
        typer.Option("--learning-rates", metavar="LOW:HIGH:COUNT", help="Or 1e-4,3e-4. Default: around each own."),
    ] = "",
    ranks: Annotated[str, typer.Option("--ranks", metavar="2,4,8", help="Try adapters at these ranks.")] = "",
    arms: Arms = "",
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006  (typer reads it, nobody changes it)
    budget: Annotated[str, typer.Option("--budget", metavar="10m", help="Time for all of it: 90s, 10m, 1.5h.")] = "10m",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of head, adapter, order and dropout.")] = 0,
    output: Output = Path("adapters"),
    overwrite: Overwrite = False,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Find the learning rate (and rank) of each arm by short runs, judged on the validation split, within a budget."""
    from peft_recipes.search.candidates import read_ranks, read_rates, read_seconds

    rates, chosen_ranks, seconds = read_rates(learning_rates), read_ranks(ranks), read_seconds(budget)
    loaded = load(recipe, embedded, changes)
    from rich.console import Console

    from peft_recipes.reporting.scan_report import render_scan
    from peft_recipes.search.scan import scan as scan_arms

    made = scan_arms(
        loaded, rates, listed_names(arms), chosen_ranks, budget=seconds, seed=seed, output=output, overwrite=overwrite,
        wait=wait, gone=_since_start(), on_trial=_told,
    )  # fmt: skip
    if as_json:
        print(json.dumps(made.data, indent=1))
    else:
        render_scan(made.data, Console())
        print(f"\nWinners: {made.recipe} (peft-recipes compare {made.recipe})")
    if not made.best:
        say("No arm has a best rate. Give it a larger --budget, or lower --learning-rates.")
        raise typer.Exit(1)


def _since_start() -> float:
    """Seconds since this process began: loading Python's libraries is the user's time as well."""
    import time

    import psutil

    return time.time() - psutil.Process().create_time()


def _told(arm: str, run: dict[str, Any], number: int, of: int) -> None:
    last = run["validation"][-1] if run["validation"] else None
    loss = f"validation loss {last['loss']:.4g} after {last['step']} steps" if last and last["loss"] else "no loss"
    ended = {"whole": "", "stopped": ", stopped early"}.get(run["ended"], f", {run['ended']}")
    say(f"{number}/{of} {arm} {run['learning_rate']:g}: {loss}{ended}")


@app.command(rich_help_panel=ADAPTERS)
@friendly
def spectrum(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of full fine-tuning: its folder.")],
    as_json: Json = False,
) -> None:
    """What full fine-tuning changed, module by module, and how much of it an adapter of some rank could hold."""
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from peft_recipes.reporting.spectrum_report import render_spectrum
    from peft_recipes.search.spectra import FILE
    from peft_recipes.search.spectra import spectrum as spectrum_of_run

    data = spectrum_of_run(run)
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        render_spectrum(data, Console())
        print(f"\n{run / FILE}")


@app.command(rich_help_panel=ADAPTERS)
@friendly
def extract(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of full fine-tuning: its folder.")],
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="The rank of the adapter.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the adapter goes.")],
    targets: Annotated[
        str, typer.Option("--targets", metavar="GROUP", help="all, attention, mlp, or module names with commas.")
    ] = "all",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """A LoRA adapter out of a full fine-tune, tested beside it and beside the trained LoRA of that rank."""
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from peft_recipes.models.architecture_table import GROUPS
    from peft_recipes.reporting.spectrum_report import render_extraction
    from peft_recipes.search.extraction import extract as extract_adapter

    named = targets if targets in ("all", *GROUPS) else listed_names(targets) or "all"
    data = extract_adapter(run, rank, output, targets=named, overwrite=overwrite)
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        render_extraction(data, Console())
        print(f"\n{output}")
