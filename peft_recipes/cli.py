"""The command line: words in, library calls, words out. No logic of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_recipes.checkpoints import disk_full
from peft_recipes.errors import RecipeError
from peft_recipes.interruption import EXIT_CODES

app = typer.Typer(
    help="Adapters measured honestly beside full fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


def _friendly(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake is one clear message and exit code 2, Ctrl-C 130, SIGTERM 143, a full disk 1; no traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except RecipeError as error:
            _say_problems(error)
            raise typer.Exit(2) from None
        except tuple(EXIT_CODES) as error:
            _say("Interrupted. What was finished is kept; the same command goes on from there.")
            raise typer.Exit(EXIT_CODES[type(error)]) from None
        except OSError as error:
            if not disk_full(error):
                raise
            _say(f"Error: no room on the disk ({error}). What was finished is kept; make room and call again.")
            raise typer.Exit(1) from None
        except BrokenPipeError:
            # The reader (head, less) has gone; Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return wrapped


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _say_problems(error: RecipeError) -> None:
    if len(error.problems) == 1:
        _say(f"Error: {error.problems[0]}")
    else:
        _say(f"Error: {len(error.problems)} problems.")
        for problem in error.problems:
            _say(f"  - {problem}")


def _load(name: str, embedded: bool, changes: list[str]) -> Any:
    from peft_recipes.quiet import quiet_libraries

    quiet_libraries()
    from peft_recipes.catalog import load_recipe

    return load_recipe(name, embedded=embedded, changes=changes)


def _names(listed: str) -> list[str] | None:
    return [name.strip() for name in listed.split(",") if name.strip()] or None


@app.command("list")
@_friendly
def list_recipes(as_json: Json = False) -> None:
    """The recipes that come with peft-recipes."""
    from peft_recipes.catalog import recipe_files
    from peft_recipes.showing import show_recipes

    recipes = [_load(name, False, []) for name in recipe_files()]
    if as_json:
        facts = [{"name": r.name, "title": r.title, "task": r.task, "model": r.model, "dataset": r.dataset.path,
                  "arms": list(r.arms), "embedded": bool(r.embedded)} for r in recipes]  # fmt: skip
        print(json.dumps(facts, indent=1))
    else:
        show_recipes(recipes)


@app.command()
@_friendly
def plan(
    recipe: RecipeArgument,
    arms: Arms = "",
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006  (typer reads it, nobody changes it)
    trial: Annotated[bool, typer.Option("--trial", help="Load the weights and time three steps of each arm.")] = False,
    as_json: Json = False,
) -> None:
    """Parameters, targets, checkpoint size, steps and memory of every arm, before anything is loaded."""
    from peft_recipes.planning import plan as make_plan
    from peft_recipes.showing import show_plan

    made = make_plan(_load(recipe, embedded, changes), _names(arms), trial=trial)
    if as_json:
        print(json.dumps(made, indent=1))
    else:
        show_plan(made)


@app.command()
@_friendly
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
    _train(_load(recipe, embedded, changes), arm, seed, as_json, output=output, resume=resume, overwrite=overwrite,
           wait=wait)  # fmt: skip


def _train(recipe: Any, arm: str, seed: int, as_json: bool, *, resume: bool, overwrite: bool, **options: Any) -> None:
    from peft_recipes.showing import show_run
    from peft_recipes.training import train as train_arm

    if resume and overwrite:
        raise RecipeError("--resume and --overwrite contradict each other; choose one.")
    try:
        quiet = not sys.stderr.isatty()
        if not quiet:
            os.environ.pop("TQDM_DISABLE", None)
        run = train_arm(recipe, arm, seed=seed, resume=resume, overwrite=overwrite, quiet=quiet, **options)
    except RecipeError:
        raise
    except Exception as error:  # a run that failed midway: its run.json has the traceback
        _say(f"The run failed: {type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(run.data, indent=1))
    else:
        show_run(run)


@app.command()
@_friendly
def compare(
    recipe: RecipeArgument,
    arms: Arms = "",
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,2", help="Seeds; every arm runs with each.")] = "0",
    embedded: Embedded = False,
    changes: Set = [],  # noqa: B006
    output: Output = Path("adapters"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train finished runs anew.")] = False,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Train several arms side by side, each run in a fresh process, and report them with intervals."""
    from peft_recipes.comparison import compare as compare_arms
    from peft_recipes.showing import show_comparison, shown_progress

    chosen = _load(recipe, embedded, changes)
    with shown_progress() as on_progress:
        made = compare_arms(
            chosen,
            _names(arms),
            _seeds(seeds),
            output=output,
            overwrite=overwrite,
            wait=wait,
            asked={"recipe": recipe, "embedded": embedded, "changes": changes, "arms": _names(arms),
                   "output": str(output)},
            on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(made.data, indent=1))
    else:
        show_comparison(made)
    if made.failed:
        _say(f"Failed: {', '.join(made.failed)}. The reason stands in the table and in each run's run.json.")
        raise typer.Exit(1)


def _seeds(listed: str) -> list[int]:
    try:
        return [int(seed) for seed in listed.split(",")]
    except ValueError:
        raise RecipeError(f"--seeds {listed}: expected whole numbers with commas between them, as in 0,1,2.") from None


@app.command()
@_friendly
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a comparison.")], as_json: Json = False
) -> None:
    """Show a comparison again, and write its report anew."""
    from peft_recipes.comparison import read_comparison
    from peft_recipes.reporting import write_reports
    from peft_recipes.runs import check_output
    from peft_recipes.showing import show_comparison

    made = read_comparison(folder)
    if as_json:
        print(json.dumps(made.data, indent=1))
        return
    check_output(made.folder, "The report goes beside its comparison: ")
    write_reports(made.data, made.folder)
    show_comparison(made)


@app.command()
@_friendly
def check(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of a saved adapter.")],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="Instead of the base that it names.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Files and shapes only, without the base's weights.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base's repository run its code here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a saved adapter, ours or anyone's: files, fit to the base, outputs, merging. Exit 1 where one fails."""
    from peft_recipes.quiet import quiet_libraries

    quiet_libraries()
    from peft_recipes.adapter_checks import check_adapter
    from peft_recipes.showing import show_findings

    found = check_adapter(adapter, base or None, weights=not quick, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=1))
    else:
        show_findings(found)
    if any(finding.ok is False for finding in found):
        raise typer.Exit(1)


def train_app(recipe: Any, arguments: list[str]) -> None:
    """`python recipes/NAME.py --arm lora`: the flags of `peft-recipes train`, for a recipe that is at hand."""
    from peft_recipes.quiet import quiet_libraries

    quiet_libraries()
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @single.command(help=f"{recipe.title or recipe.name}: train one arm ({', '.join(recipe.arms)}) once.")
    @_friendly
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
        from peft_recipes.catalog import changed

        _train(changed(recipe, embedded, changes), arm, seed, as_json, output=output, resume=resume,
               overwrite=overwrite, wait=wait)  # fmt: skip

    single(arguments)
