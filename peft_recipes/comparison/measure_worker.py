"""The process of one turn of `--measure`.

`python -m peft_recipes.comparison.measure_worker FOLDER ARM SEED STEPS [DATA]`; turns.py starts it. It prints what it
measured as its last line, in JSON, and writes no file of the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft_recipes.comparison.worker import end_with_parent
from peft_recipes.distributed.quiet import quiet_libraries
from peft_recipes.errors import RecipeError

MARK = "measured: "  # starts the line that holds the figures


def work(folder: str, arm: str, seed: int, steps: int, data: str | None = None) -> int:
    """Measure one turn; return the exit code: 0 done, 2 an error in the recipe."""
    end_with_parent()
    quiet_libraries()
    from peft_recipes.training.remeasure import remeasure

    try:
        measured = remeasure(Path(folder), arm, seed, steps=steps, data=Path(data) if data else None)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    print(MARK + json.dumps(measured), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:6]))
