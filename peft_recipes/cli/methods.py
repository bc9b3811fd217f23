"""The command on the table of methods."""

from __future__ import annotations

import json

from peft_recipes.cli.common import RECIPES, Json, app, friendly


@app.command(rich_help_panel=RECIPES)
@friendly
def methods(as_json: Json = False) -> None:
    """The methods that `--arms` takes on any recipe: defaults, a rate to start from, papers, what each can't do."""
    from peft_recipes.arms.methods import table
    from peft_recipes.cli.output.plans import show_methods

    if as_json:
        print(json.dumps(table(), indent=1, ensure_ascii=False))
    else:
        show_methods(table())
