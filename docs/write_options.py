"""Write docs/reference/training-options.md from the table of options. `make readme` runs it; a test checks the page."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from peft_recipes.distributed.quiet import skip_bitsandbytes
from peft_recipes.recipe import trainer_options

PAGE = Path(__file__).parent / "reference" / "training-options.md"

_HEAD = """# Training options

Written by `make readme` from `peft_recipes/recipe/trainer_options.py`: what `training` of a recipe may set.
Honoured options do what their library documents; owned ones are set elsewhere; refused ones end with an error before
anything is loaded.
"""


def page() -> str:
    """The text of docs/reference/training-options.md."""
    counts, lines = [], ["| option | class | what happens | where, or why |", "|:---|:---|:---|:---|"]
    base = {f.name: trainer_options.row(f.name, "TrainingArguments") for f in dataclasses.fields(TrainingArguments)}
    classes: dict[tuple[str, trainer_options.Row], list[str]] = {}  # that have the same row for an option
    listed = (TrainingArguments, Seq2SeqTrainingArguments, SFTConfig, DPOConfig, RewardConfig, KTOConfig, GRPOConfig)
    for options in listed:
        rows = {f.name: trainer_options.row(f.name, options.__name__) for f in dataclasses.fields(options)}
        number = Counter(row.status for row in rows.values())
        shares = ", ".join(f"{number[status]} {status}" for status in ("honoured", "owned", "refused"))
        counts.append(f"- {options.__name__}: {len(rows)} options, {shares}.")
        for name, row in sorted(rows.items()):
            if options is TrainingArguments or base.get(name) != row:
                classes.setdefault((name, row), []).append(options.__name__)
    lines += [f"| `{name}` | {', '.join(names)} | {row.status} | {row.why} |" for (name, row), names in classes.items()]
    return "\n".join([_HEAD, *counts, "", *lines]) + "\n"


if __name__ == "__main__":
    skip_bitsandbytes()  # on a CPU it prints what it could not load
    PAGE.write_text(page(), encoding="utf-8")
