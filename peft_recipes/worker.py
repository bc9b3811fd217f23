"""The process of one run of a comparison: `python -m peft_recipes.worker RECIPE ARM SEED OUTPUT [DATA]`."""

from __future__ import annotations

import sys
from pathlib import Path

from peft_recipes.errors import RecipeError
from peft_recipes.quiet import quiet_libraries


def work(recipe_file: str, arm: str, seed: int, output: str, data: str | None = None) -> int:
    """Trains one run and returns the exit code: 0 done, 1 failed (its run.json says why), 2 a mistake in the recipe.

    data: the folder of the comparison's prepared data; without it the run prepares its own.
    """
    quiet_libraries()
    from peft_recipes.catalog import resolved_recipe
    from peft_recipes.runs import RUN_FILE, make_folder, run_folder, write_json
    from peft_recipes.training import train

    recipe = resolved_recipe(Path(recipe_file))
    try:
        train(recipe, arm, seed=seed, output=output, overwrite=True, data=data)
        return 0
    except RecipeError as error:
        folder = run_folder(Path(output), recipe, arm, seed)
        make_folder(folder)
        facts = {"schema": 1, "status": "failed", "error": str(error), "recipe": recipe.name, "arm": arm, "seed": seed}
        write_json(folder / RUN_FILE, facts)
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:6]))
