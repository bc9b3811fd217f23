"""Commands that change a comparison while it runs: stop, add."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from peft_recipes.cli.common import RECIPES, Json, command, say, show

Running = Annotated[Path, Argument(metavar="DIR", help="Name the folder of a comparison that runs.")]


@command(RECIPES)
def stop(
    folder: Running,
    arm: Annotated[str, Argument(metavar="ARM", help="Name the arm.")],
    as_json: Json = False,
) -> None:
    """Stop an arm of a comparison that runs; its finished seeds and its checkpoint are kept."""
    _ask(folder, {"do": "stop", "arm": arm}, as_json, "The next call trains the arms of --arms alone.")


@command(RECIPES)
def add(
    folder: Running,
    arm: Annotated[str, Argument(metavar="ARM", help="Name the arm to vary, or a stopped one to take up again.")],
    changes: Annotated[list[str], Option("--set", metavar="K=V", help="Change the variant: peft.r=32.")] = [],  # noqa: B006
    name: Annotated[str, Option("--as", metavar="NAME", help="Name the variant (default: by its changes).")] = "",
    as_json: Json = False,
) -> None:
    """Add a variant of an arm to a comparison that runs, or take up a stopped arm again."""
    from peft_recipes.comparison.changes import take_up_later

    request = {"do": "add", "arm": arm, "changes": changes, "name": name or None}
    if not changes and not name and (said := take_up_later(folder, arm)):
        show(as_json, {**request, "said": said}, lambda: print(said))
        return
    _ask(folder, request, as_json, "Add the arm to the recipe instead, and compare: finished runs are kept.")


def _ask(folder: Path, request: dict[str, Any], as_json: bool, instead: str) -> None:
    """Ask the comparison that runs in a folder, and print its answer. instead: what to do where none runs."""
    from peft_recipes.comparison.requests import Unanswered, ask, check_running

    check_running(folder, instead)
    try:
        said = ask(folder, request, lambda: say(f"Waiting for the comparison in {folder} (Ctrl-C withdraws it)."))
    except Unanswered as error:
        say(f"Error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        say(str(error) or "Interrupted.")
        raise typer.Exit(130) from None
    show(as_json, {**request, "said": said}, lambda: print(said))
