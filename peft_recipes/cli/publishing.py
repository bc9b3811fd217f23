"""The commands that publish: push, reproduce."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from peft_recipes.cli.common import ADAPTERS, Json, Set, app, friendly, say

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the base's repository run its code here.")
]


@app.command(rich_help_panel=ADAPTERS)
@friendly
def push(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A run's folder; with --all a comparison's.")],
    repo_id: Annotated[str, typer.Option("--repo-id", metavar="ORG/NAME", help="Where on the Hub it goes.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; private without it.")] = False,
    send_all: Annotated[
        bool, typer.Option("--all", help="Every adapter of a comparison, to ORG/NAME-ARM, and a card of them all.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show what would be sent; send nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Send an adapter to the Hub with its card, its evidence and its recipe, checked first, in one commit."""
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    from peft_recipes.cli.output.results import show_parcel, show_published
    from peft_recipes.publishing.push import publish, publish_all

    options = {"public": public, "dry_run": dry_run, "trust_remote_code": trust_remote_code,
               "on_ready": None if as_json else show_parcel}  # fmt: skip
    made = publish_all(adapter, repo_id, **options) if send_all else [publish(adapter, repo_id, **options)]
    if as_json:
        shown = [one.to_dict() for one in made]
        print(json.dumps(shown if send_all else shown[0], indent=1))
    else:
        show_published(made, dry_run)


@app.command(rich_help_panel=ADAPTERS)
@friendly
def reproduce(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run's folder, or its repository: ORG/NAME.")],
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="Keep the new run here.")] = "",
    changes: Set = [],  # noqa: B006
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train an adapter again from its recipe and compare every metric with its evidence. Exit 1 where one fails."""
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    from peft_recipes.cli.output.results import show_reproduction
    from peft_recipes.errors import RecipeError
    from peft_recipes.publishing.reproduce import reproduce as train_again

    quiet = not sys.stderr.isatty()
    if not quiet:
        os.environ.pop("TQDM_DISABLE", None)
    try:
        made = train_again(
            adapter, output=output or None, changes=changes, trust_remote_code=trust_remote_code, quiet=quiet
        )
    except RecipeError:
        raise
    except Exception as error:  # the new run failed midway
        say(f"The run failed here: {type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        show_reproduction(made)
    if not made.held:
        raise typer.Exit(1)
