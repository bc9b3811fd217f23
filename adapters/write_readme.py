"""Writes the figures of the kept comparisons into README.md and adapters/README.md: `make readme`.

Nothing is computed here: both come from adapters/*/comparison.json, and tests/test_readme.py holds them together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft_recipes.reporting.markdown import escape_inline, table_markdown
from peft_recipes.reporting.words import forgetting, headline_arm, verdict_sentence

HERE = Path(__file__).parent
SHOWN = "mnist-shift"
_BLOCK = re.compile(r"(<!-- results:.*?-->\n).*?(<!-- /results -->)", re.DOTALL)


def results(comparison: dict[str, Any]) -> str:
    """The README's block: the sentence, the plot, the table, what was forgotten."""
    folder = f"adapters/{comparison['recipe']}"
    plot = "parameters"
    lines = [
        f"> {escape_inline(verdict_sentence(comparison, headline_arm(comparison)))}",
        "",
        f"![Quality against trained parameters]({folder}/plots/{plot}.png)",
        "",
        table_markdown(comparison, most=5),
        "",
        *(f"- {escape_inline(line)}" for line in forgetting(comparison)),
        "",
        f"Written from [{folder}/comparison.json]({folder}/comparison.json), which `make kept` made; the whole report "
        f"is [comparison.md]({folder}/comparison.md).",
        "",
    ]
    return "\n".join(lines)


def readme(text: str, comparison: dict[str, Any]) -> str:
    """README.md's text with its results block made anew."""
    return _BLOCK.sub(lambda match: match[1] + results(comparison) + match[2], text)


def index(comparisons: list[dict[str, Any]]) -> str:
    """adapters/README.md: one section a kept comparison."""
    lines = [
        "# Kept adapters",
        "",
        "Small adapters that are kept with the evidence of their comparison. Written by `make readme`.",
        "",
    ]
    for comparison in comparisons:
        name = comparison["recipe"]
        lines += [
            f"## [{name}]({name}/comparison.md)",
            "",
            f"{escape_inline(comparison['title'])}. Base `{comparison['model']}`, data `{comparison['dataset']}`, "
            f"seeds {', '.join(map(str, comparison['seeds']))}.",
            "",
            table_markdown(comparison, most=5),
            "",
        ]
    return "\n".join(lines)


def kept() -> list[dict[str, Any]]:
    """The comparisons below this folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*/comparison.json"))]


def main() -> None:
    comparisons = kept()
    path = HERE.parent / "README.md"
    shown = next(c for c in comparisons if c["recipe"] == SHOWN)
    path.write_text(readme(path.read_text(encoding="utf-8"), shown), encoding="utf-8")
    (HERE / "README.md").write_text(index(comparisons), encoding="utf-8")


if __name__ == "__main__":
    main()
