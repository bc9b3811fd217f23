"""Shared by all commands: options, error handling and exit codes, and messages on stderr."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer import Argument, Option

from peft_recipes.distributed.processes import OtherRankFailed, is_rank_zero, joined, wait_for_rank_zero_to_fail
from peft_recipes.distributed.quiet import quiet_libraries
from peft_recipes.errors import JudgeError, RecipeError
from peft_recipes.runs.checkpoints import disk_full
from peft_recipes.training.interruption import EXIT_CODES

app = typer.Typer(
    help="Train adapters and compare them with full fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"peft-recipes {importlib.metadata.version('peft_recipes')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# The panels of `peft-recipes --help`.
RECIPES, ADAPTERS = "On recipes", "On saved adapters"

RecipeArgument = Annotated[str, Argument(metavar="RECIPE", help="Name a recipe, or a path to a .py or .yaml.")]
Embedded = Annotated[bool, Option("--embedded", help="Use the stand-in model and data, which need no Hub.")]
Set = Annotated[list[str], Option("--set", metavar="K=V", help="Change a setting: training.max_steps=50.")]
Benchmarks = Annotated[
    str, Option("--benchmarks", metavar="A,B", help="Evaluate on these lm_eval tasks: names, or files of your own.")
]
Arms = Annotated[str, Option("--arms", metavar="A,B", help="Select arms (default: all of the recipe's).")]
ArmName = Annotated[str, Option("--arm", help="Name the arm to train, or 'base' to evaluate the untrained base.")]
Seed = Annotated[int, Option("--seed", min=0, help="Seed the head, the adapter, the data order and dropout.")]
Output = Annotated[Path, Option("--output", metavar="DIR", help="Write runs to this folder.")]
Resume = Annotated[
    bool, Option("--resume", help="Keep a finished run, continue an unfinished one, start one if there is none.")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace earlier results.")]
Wait = Annotated[bool, Option("--wait", help="Wait while another process writes to the folder.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document to stdout and nothing else.")]
On = Annotated[str, Option("--on", metavar="PLACE", help="Train on this machine (local) or on a Ray cluster (ray).")]
Address = Annotated[
    str,
    Option("--address", metavar="ADDRESS", help="Name the cluster: ray://HOST:10001, HOST:6379, auto or local."),
]
Adapter = Annotated[Path, Argument(metavar="ADAPTER", help="Name the folder of a saved adapter.")]
Adapters = Annotated[list[Path], Argument(metavar="ADAPTER ...", help="Name folders of adapters of one base.")]
Base = Annotated[str, Option("--base", metavar="MODEL", help="Use this base model instead of the adapter's own.")]
Trust = Annotated[bool, Option("--trust-remote-code", help="Allow code from the base's repository to run.")]


def command(panel: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`, in a panel of its help, with the shared error handling."""
    return lambda function: app.command(name, rich_help_panel=panel)(handle_errors(function))


def handle_errors(function: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions into one message and an exit code, without a traceback.

    2 for a user error, 130 after Ctrl-C, 143 after SIGTERM, 1 for a full disk or a judge that can't be asked. Also
    silences the libraries' logging.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        _replace_unprintable()
        try:
            with _document_alone(kwargs.get("as_json", False)):
                function(*args, **kwargs)
        except RecipeError as error:
            if not joined():
                wait_for_rank_zero_to_fail()
            say_problems(error)
            raise typer.Exit(2) from None
        except OtherRankFailed:  # the rank that failed reports the error; the launcher exits with its code
            raise typer.Exit(0) from None
        except JudgeError as error:
            say(f"Error: {error}")
            raise typer.Exit(1) from None
        except tuple(EXIT_CODES) as error:
            if is_rank_zero():
                say(_interrupted(function.__name__))
            raise typer.Exit(EXIT_CODES[type(error)]) from None
        except BrokenPipeError:
            # The reader (head, less) has closed the pipe; without this Python complains again when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:  # safetensors and pyarrow have classes of their own for a full disk
            if not disk_full(error):
                raise
            say(
                f"Error: the disk is full ({error}). Finished runs are kept; free some space and run the command again."
            )
            raise typer.Exit(1) from None

    return wrapped


def _interrupted(command: str) -> str:
    """What is left after Ctrl-C, and how to go on."""
    if command not in ("train", "compare", "scan", "reproduce"):
        return "Interrupted."
    again = "; run it again with --resume to continue" if command == "train" else "; run the same command to continue"
    return f"Interrupted. Finished runs are kept{again}."


_document: TextIO | None = None  # where the document of --json goes, while sys.stdout is stderr


@contextlib.contextmanager
def _document_alone(as_json: bool) -> Iterator[None]:
    """Under --json, send to stderr what libraries print (transformers prints a line where WANDB_MODE is offline)."""
    global _document
    _document = sys.stdout if as_json else None
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield
    finally:
        _document = None


def _replace_unprintable() -> None:
    """Print ? for a character that the terminal's encoding lacks (PYTHONIOENCODING=ascii, LANG=C), not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if not _prints_utf8(stream) and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _prints_utf8(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def say(text: str) -> None:
    """Print a message to stderr: stdout may be JSON."""
    print(text, file=sys.stderr)


def say_problems(error: RecipeError) -> None:
    """Print every problem of a RecipeError, one per line."""
    if len(error.problems) == 1:
        say(f"Error: {error.problems[0]}")
    else:
        say(f"Error: {len(error.problems)} problems.")
        for problem in error.problems:
            say(f"  - {problem}")


def show(as_json: bool, data: Any, render: Callable[[], None], *, ensure_ascii: bool = True) -> None:
    """Print the data as the JSON document of --json, or call `render` to print it for people."""
    if as_json:
        document = _document or sys.stdout
        print(json.dumps(data, indent=1, ensure_ascii=ensure_ascii or not _prints_utf8(document)), file=document)
    else:
        render()


def unless_refused(function: Any, *args: Any, **options: Any) -> Any:
    """Call the function; if the result fails its own verification, print why and exit with 1."""
    from peft_recipes.adapters.merge import VerificationError

    try:
        return function(*args, **options)
    except VerificationError as error:
        say(f"Refused: {error}")
        raise typer.Exit(1) from None


def with_benchmarks(changes: list[str], benchmarks: str) -> list[str]:
    """The changes of a recipe, with the benchmarks that --benchmarks names, if any."""
    return [*changes, f"benchmarks={json.dumps(split_names(benchmarks))}"] if benchmarks else changes


def load(name: str, embedded: bool, changes: list[str]) -> Any:
    """Load the recipe that a command names, with its changes."""
    from peft_recipes.catalog.recipes import load_recipe

    return load_recipe(name, embedded=embedded, changes=changes)


def split_names(text: str) -> list[str] | None:
    """The names of "A,B"; None if there are none."""
    return [name.strip() for name in text.split(",") if name.strip()] or None


def quiet_without_terminal() -> bool:
    """Whether to hide progress bars: stderr is no terminal. Otherwise undoes what `quiet_libraries` set for tqdm."""
    if sys.stderr.isatty():
        os.environ.pop("TQDM_DISABLE", None)
        return False
    return True
