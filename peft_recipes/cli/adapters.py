"""The commands on saved adapters: check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peft_recipes.cli.common import ADAPTERS, Json, app, friendly


@app.command(rich_help_panel=ADAPTERS)
@friendly
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
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    from peft_recipes.adapters.check import check_adapter
    from peft_recipes.cli.output.results import show_findings

    found = check_adapter(adapter, base or None, weights=not quick, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps([{"name": f.name, "ok": f.ok, "said": f.message} for f in found], indent=1))
    else:
        show_findings(found)
    if any(finding.ok is False for finding in found):
        raise typer.Exit(1)
