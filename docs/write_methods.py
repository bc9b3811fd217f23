"""Write docs/methods.md from the table of methods. `make readme` runs it; a test checks that the page is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_recipes.arms.methods import table
from peft_recipes.distributed.quiet import skip_bitsandbytes

PAGE = Path(__file__).with_name("methods.md")

_HEAD = """# Methods

Written by `make readme` from the table in `peft_recipes/arms/methods.py`; `peft-recipes methods` prints the same.

Each of these is an arm for any recipe: `peft-recipes compare RECIPE --arms full,lora,dora,ia3`, also in `plan`,
`train --arm dora`, and from Python. `--arms all` selects the recipe's own arms and every method that fits its base and
task, and reports which do not and why. If the recipe has an arm of that name, its own is used. The learning rates are
starting points; those marked * scale with the learning rate of the recipe's own LoRA, which was chosen for its base.
`--set arms.dora.learning_rate=1e-3` and `--set arms.dora.peft.r=8` work as for the recipe's own arms.
"""


def page() -> str:
    """The text of docs/methods.md."""
    methods = table()
    rows = ["| name | method | learning rate | defaults | can't | paper |", "|:---|:---|---:|:---|:---|:---|"]
    rows += [_row(row) for row in methods["methods"]]
    reasons = {why: [n for n, w in methods["left_out"].items() if w == why] for why in methods["left_out"].values()}
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
    skip_bitsandbytes()  # on a CPU it prints what it could not load
    PAGE.write_text(page(), encoding="utf-8")
