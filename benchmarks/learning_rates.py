"""The scan behind a recipe's learning rates, and a test of its learning rates against the recipe's.

    python benchmarks/learning_rates.py smollm2-alpaca --embedded --learning-rates 1e-5:3e-3:6 --budget 10m
    python benchmarks/learning_rates.py smollm2-alpaca --embedded --compare

The first is `peft-recipes scan`; it prints scan.json, and --keep writes benchmarks/learning_rates/RECIPE-scan.json.
--compare reads that file (or that of --output), trains every arm at the recipe's learning rate and at the scan's, tests
each once, and adds the differences, paired by test example. Files without -scan come from an earlier script, which
trained all learning rates to the end.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from harness import result_parser, write_result

from peft_recipes import Arm, Recipe, RecipeError, compare, load_recipe, scan
from peft_recipes.distributed.quiet import quiet_libraries
from peft_recipes.recipe.metrics import margin_for
from peft_recipes.runs.folder import read_run, run_folder
from peft_recipes.search.candidates import read_learning_rates, read_seconds
from peft_recipes.statistics.bootstrap import paired_difference, verdict
from peft_recipes.statistics.scores import scores

HERE = Path(__file__).parent / "learning_rates"


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--arms", default="")
    parser.add_argument("--learning-rates", default="")
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--seeds", default="0", help="seeds of --compare")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--runs", default="runs/learning-rates", help="folder of the scan and the runs")
    given = parser.parse_args()
    quiet_libraries()
    recipe = load_recipe(given.recipe, embedded=given.embedded, changes=given.changes)
    kept = HERE / f"{given.recipe}{'-embedded' if given.embedded else ''}-scan.json"
    if given.compare:
        path = given.output or kept
        if not path.is_file():
            raise RecipeError(f"{path} is not there: make it first, without --compare.")
        result = json.loads(path.read_text(encoding="utf-8"))
        seeds = [int(seed) for seed in given.seeds.split(",")]
        summary = result["against_the_recipe"] = against_the_recipe(recipe, result, seeds, Path(given.runs))
    else:
        arms = [name for name in given.arms.split(",") if name] or None
        made = scan(
            recipe,
            read_learning_rates(given.learning_rates),
            arms,
            budget=read_seconds(given.budget),
            output=given.runs,
            on_trial=lambda arm, run, number, of: print(f"{number}/{of}", arm, run["learning_rate"], run["ended"]),
        )
        result, summary = made.data, made.best
    write_result(given, kept, result, summary)


def against_the_recipe(recipe: Recipe, result: dict[str, Any], seeds: list[int], output: Path) -> dict[str, Any]:
    """For each arm: the test metric at both learning rates, and the scan's minus the recipe's with its interval."""
    compared = {}
    for name, arm in result["arms"].items():
        if arm["best"] is None or name not in recipe.arms:
            continue
        own = recipe.arms[name]
        both = {name: own, f"{name}-scan": Arm(own.method, learning_rate=arm["best"])}
        changed = dataclasses.replace(recipe, arms=both, embedded={})
        compare(changed, seeds=seeds, output=output)
        runs = {called: [read_run(run_folder(output, recipe, called, seed)) for seed in seeds] for called in both}
        mine, theirs = ([scores(run, recipe) for run in runs[called]] for called in (f"{name}-scan", name))
        difference = paired_difference(
            np.stack([s for _, s, _ in mine]), np.stack([s for _, s, _ in theirs]), weights=mine[0][2]
        )
        values = {called: [run.metrics["test"][recipe.metric] for run in done] for called, done in runs.items()}
        margin = recipe.margin or margin_for(recipe.metric, float(np.mean(values[name])))
        compared[name] = {
            "recipe": {"learning_rate": own.learning_rate, "test": values[name]},
            "scan": {"learning_rate": arm["best"], "test": values[f"{name}-scan"]},
            "metric": recipe.metric,
            "steps": runs[name][0].data["training"]["steps"],
            **difference.to_dict(),
            "margin": margin,
            "verdict": verdict(difference, margin, recipe.higher_is_better),
        }
    return compared


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"Error: {error}") from None
