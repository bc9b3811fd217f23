"""Console output of `export`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from peft_recipes.exporting.card import conversion_lines, verification_lines
from peft_recipes.reporting.formats import human_bytes


def show_export(result: dict[str, Any], output: Path) -> None:
    """Print what was written, what was verified and how it is served."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(result['adapter'])}[/] ({result['method']}) of {escape(result['base'])} "
                  f"as {result['to']}", soft_wrap=True)  # fmt: skip
    lines = conversion_lines(result) if result["to"] == "lora" else []
    for line in [*lines, *verification_lines(result), *result.get("notes", [])]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    for name, size in result["bytes"].items():
        if name.endswith((".gguf", ".safetensors")):
            console.print(f"  {escape(str(output / name))}, {human_bytes(size)}", soft_wrap=True)
    places = {"DIR": shlex.quote(str(output)), "BASE": shlex.quote(result.get("base_argument", "BASE"))}
    for program, text in result.get("commands", {}).items():
        text = re.sub("DIR|BASE", lambda found: places[found[0]], text)
        console.print(f"  [dim]{program}:[/] {escape(text)}", soft_wrap=True)
