"""The process of one short run of a scan: `python -m peft_recipes.search.trial_worker RECIPE OPTIONS RESULT`.

remote_trials.py has it started on a node. It prepares the data again, as the scan has done, trains, and writes RESULT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft_recipes.comparison.worker import end_with_parent
from peft_recipes.distributed.quiet import quiet_libraries
from peft_recipes.errors import RecipeError


def work(recipe_file: str, options_file: str, result: str) -> int:
    """Do one run; return the exit code: 0 done (`result` is its entry of scan.json), 2 an error in the recipe."""
    end_with_parent()
    quiet_libraries()
    from peft_recipes.runs.files import write_json
    from peft_recipes.runs.folder import resolved_recipe
    from peft_recipes.search.trials import one_trial

    trial = json.loads(Path(options_file).read_text(encoding="utf-8"))
    try:
        entry = one_trial(resolved_recipe(Path(recipe_file)), trial)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    write_json(Path(result), entry)
    return 0


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:4]))
