"""What the commands share: their common options, and how a mistake, an interruption or a full disk is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_recipes.distributed.processes import OtherRankFailed, is_rank_zero, joined, wait_for_rank_zero_to_fail
from peft_recipes.errors import RecipeError
from peft_recipes.runs.checkpoints import disk_full
from peft_recipes.training.interruption import EXIT_CODES

app = typer.Typer(
    help="Adapters measured honestly beside full fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The panels of `peft-recipes --help`.
RECIPES, ADAPTERS = "On recipes", "On saved adapters"

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a path to a .py or .yaml.")]
Embedded = Annotated[bool, typer.Option("--embedded", help="Stand-in model and data that need no Hub.")]
Set = Annotated[list[str], typer.Option("--set", metavar="K=V", help="Change a setting: training.max_steps=50.")]
Arms = Annotated[str, typer.Option("--arms", metavar="A,B", help="Only these arms (default: all of the recipe's).")]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where runs go.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep a finished run, go on with an unfinished one, start where there is none.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Wait = Annotated[bool, typer.Option("--wait", help="Where another process writes there, wait until it is done.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake is one clear message and exit code 2, Ctrl-C 130, SIGTERM 143, a full disk 1; no traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except RecipeError as error:
            if not joined():
                wait_for_rank_zero_to_fail()
            say_problems(error)
            raise typer.Exit(2) from None
        except OtherRankFailed:  # the process that failed says why, and its exit code is the launcher's
            raise typer.Exit(0) from None
        except tuple(EXIT_CODES) as error:
            if is_rank_zero():
                say("Interrupted. What was finished is kept; the same command goes on from there.")
            raise typer.Exit(EXIT_CODES[type(error)]) from None
        except BrokenPipeError:
            # The reader (head, less) has gone; Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            if not disk_full(error):
                raise
            say(f"Error: no room on the disk ({error}). What was finished is kept; make room and call again.")
            raise typer.Exit(1) from None

    return wrapped


def say(text: str) -> None:
    """A line for the person: on stderr, since stdout may be JSON."""
    print(text, file=sys.stderr)


def say_problems(error: RecipeError) -> None:
    """Every problem of what was given, one a line."""
    if len(error.problems) == 1:
        say(f"Error: {error.problems[0]}")
    else:
        say(f"Error: {len(error.problems)} problems.")
        for problem in error.problems:
            say(f"  - {problem}")


def load(name: str, embedded: bool, changes: list[str]) -> Any:
    """The recipe that a command names, with its changes; the libraries' own chatter is turned off first."""
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    from peft_recipes.catalog.recipes import load_recipe

    return load_recipe(name, embedded=embedded, changes=changes)


def listed_names(listed: str) -> list[str] | None:
    """The names of "A,B"; None where there are none."""
    return [name.strip() for name in listed.split(",") if name.strip()] or None
