"""The command that hands out the instructions for AI assistants: skill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from peft_recipes.cli.common import RECIPES, command, say

SKILL = Path(__file__).parent.parent / "skills" / "peft-recipes" / "SKILL.md"


@command(RECIPES)
def skill(
    as_text: Annotated[bool, Option("--print", help="Print the instructions themselves.")] = False,
    output: Annotated[
        str, Option("--output", metavar="DIR", help="Copy them to DIR/peft-recipes/SKILL.md: .claude/skills.")
    ] = "",
) -> None:
    """Show where the instructions for AI assistants are (SKILL.md): commands in order, verdicts, errors, limits."""
    from peft_recipes.runs.files import check_output, make_folder, write_text

    text = SKILL.read_text(encoding="utf-8")
    if output:
        folder = Path(output) / SKILL.parent.name
        check_output(folder)
        make_folder(folder)
        write_text(folder / SKILL.name, text)
        say(f"Copied to {folder / SKILL.name}")
    elif not as_text:
        print(SKILL)
    if as_text:
        print(text, end="")
