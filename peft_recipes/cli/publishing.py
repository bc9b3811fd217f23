"""Commands that publish and verify: push, reproduce, gallery."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from peft_recipes.cli.common import ADAPTERS, RECIPES, Json, Set, Trust, command, quiet_without_terminal, say, show
from peft_recipes.distributed.quiet import skip_bitsandbytes
from peft_recipes.errors import RecipeError


@command(ADAPTERS)
def push(
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="Name a run's folder, or with --all a comparison's.")],
    repo_id: Annotated[str, Option("--repo-id", metavar="ORG/NAME", help="Push to this repository of the Hub.")],
    public: Annotated[bool, Option("--public", help="Make the repository public; it is private otherwise.")] = False,
    send_all: Annotated[
        bool, Option("--all", help="Push every adapter of a comparison to ORG/NAME-ARM, and a card of them all.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and show what would be pushed; push nothing.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Push an adapter to the Hub with its card, evidence and recipe, checked first, in one commit."""
    from peft_recipes.cli.output.results import show_published, show_upload
    from peft_recipes.publishing.push import publish, publish_all

    options = {"public": public, "dry_run": dry_run, "trust_remote_code": trust_remote_code,
               "on_ready": None if as_json else show_upload}  # fmt: skip
    published = publish_all(adapter, repo_id, **options) if send_all else [publish(adapter, repo_id, **options)]
    documents = [one.to_dict() for one in published]
    show(as_json, documents if send_all else documents[0], lambda: show_published(published, dry_run))


@command(ADAPTERS)
def reproduce(
    adapter: Annotated[
        str, Argument(metavar="ADAPTER", help="Name a run's folder, or a repository of the Hub: ORG/NAME.")
    ],
    output: Annotated[str, Option("--output", metavar="DIR", help="Keep the rerun in this folder.")] = "",
    changes: Set = [],  # noqa: B006
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Rerun an adapter's recipe and compare every metric with its evidence. Exit 1 if one differs."""
    from peft_recipes.cli.output.results import show_reproduction
    from peft_recipes.publishing.reproduce import reproduce as rerun

    quiet = quiet_without_terminal()
    try:
        result = rerun(
            adapter, output=output or None, changes=changes, trust_remote_code=trust_remote_code, quiet=quiet
        )
    except RecipeError:
        raise
    except Exception as error:  # the rerun failed midway
        say(f"The run failed here: {type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    show(as_json, result.to_dict(), lambda: show_reproduction(result))
    if not result.held:
        raise typer.Exit(1)


@command(RECIPES)
def gallery(
    folder: Annotated[Path, Argument(metavar="DIR", help="Name a folder with comparisons and runs, at any depth.")],
    output: Annotated[Path, Option("--output", metavar="DIR", help="Write the pages to this folder.")] = Path(
        "gallery"
    ),
    title: Annotated[str, Option("--title", metavar="TEXT", help="Give the page this title.")] = "Gallery",
    as_json: Json = False,
) -> None:
    """Make one static page of all comparisons and adapters below a folder, with filters, reports and cards."""
    skip_bitsandbytes()
    from peft_recipes.cli.output.progress import progress_bar
    from peft_recipes.cli.output.results import show_gallery
    from peft_recipes.gallery.write import write_gallery

    with progress_bar("pages") as on_progress:
        written = write_gallery(folder, output, title, on_progress)
    show(as_json, written.to_dict(), lambda: show_gallery(written))
