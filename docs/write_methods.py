"""Writes docs/methods.md from the table of methods: `make readme` does, and a test compares the page with the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_recipes.arms.methods import table

PAGE = Path(__file__).with_name("methods.md")

_HEAD = """# Methods

Written by `make readme` from the table in `peft_recipes/arms/methods.py`; `peft-recipes methods` prints the same.

Any of these is an arm of any recipe: `peft-recipes compare RECIPE --arms full,lora,dora,ia3`, also in `plan`,
`train --arm dora`, and from Python. `--arms all` takes the recipe's own arms and every method that fits its base and
task, and reports the others with the reason. If the recipe has an arm of the same name, that arm is used. The learning
rates are starting points; those marked * are scaled with the learning rate of the recipe's own LoRA arm.
`--set arms.dora.learning_rate=1e-3` and `--set arms.dora.peft.r=8` change such an arm like one of the recipe's own.
"""


def page() -> str:
    """The page's text."""
    found = table()
    rows = ["| name | method | learning rate | defaults | can't | paper |", "|:---|:---|---:|:---|:---|:---|"]
    rows += [_row(row) for row in found["methods"]]
    reasons = {why: [n for n, w in found["left_out"].items() if w == why] for why in found["left_out"].values()}
    missing = ["## Not in the table", "", *(f"- {', '.join(names)}: {why}." for why, names in reasons.items())]
    return "\n".join([_HEAD, *rows, "", *missing]) + "\n"


def _row(row: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in {**row["options"], **row["arm"]}.items())
    cannot = [*([] if row["merges"] else ["merge"]), *row["cannot"]]
    paper = f"[{row['paper']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["paper"]
    cells = [f"`{row['name']}`", row["title"], f"{row['learning_rate']:g}{' *' * row['like_lora']}",
             f"`{row['config']}({options})`: {row['defaults']}", "; ".join(cannot), paper]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
