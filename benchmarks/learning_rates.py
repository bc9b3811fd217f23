"""The scan behind a recipe's learning rates, kept; and whether what it found is worse than what the recipe has.

    python benchmarks/learning_rates.py smollm2-alpaca --embedded --learning-rates 1e-5:3e-3:6 --budget 10m
    python benchmarks/learning_rates.py smollm2-alpaca --embedded --compare

The first is `peft-recipes scan`, its scan.json kept in benchmarks/learning_rates/RECIPE-scan.json. With --compare every
arm is trained as the recipe has it, at the recipe's rate and at the scan's, and tested once: the differences, paired by
test example, are added to that file. The files without -scan are of an earlier script, which trained every rate whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from peft_recipes import Arm, Recipe, RecipeError, compare, load_recipe, scan
from peft_recipes.distributed.quiet import quiet_libraries
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import read_run, run_folder
from peft_recipes.search.candidates import read_rates, read_seconds
from peft_recipes.statistics.bootstrap import margin_for, paired_difference, verdict
from peft_recipes.statistics.results import scores

HERE = Path(__file__).parent / "learning_rates"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--arms", default="")
    parser.add_argument("--learning-rates", default="")
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--seeds", default="0", help="of --compare")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--runs", default="runs/learning-rates", help="where the scan and the runs go")
    parser.add_argument("--into", default=str(HERE))
    given = parser.parse_args()
    quiet_libraries()
    recipe = load_recipe(given.recipe, embedded=given.embedded, changes=given.changes)
    path = Path(given.into) / f"{given.recipe}{'-embedded' if given.embedded else ''}-scan.json"
    if given.compare:
        if not path.is_file():
            raise RecipeError(f"{path} is not there: make it first, without --compare.")
        found = json.loads(path.read_text(encoding="utf-8"))
        seeds = [int(seed) for seed in given.seeds.split(",")]
        found["against_the_recipe"] = against_the_recipe(recipe, found, seeds, Path(given.runs))
        print(json.dumps(found["against_the_recipe"]))
    else:
        arms = [name for name in given.arms.split(",") if name] or None
        made = scan(
            recipe, read_rates(given.learning_rates), arms, budget=read_seconds(given.budget), output=given.runs,
            on_trial=lambda arm, run, number, of: print(f"{number}/{of}", arm, run["learning_rate"], run["ended"]),
        )  # fmt: skip
        found = made.data
        print(json.dumps(made.best))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)


def against_the_recipe(recipe: Recipe, found: dict[str, Any], seeds: list[int], output: Path) -> dict[str, Any]:
    """Of each arm: the test metric at both rates, and the scan's minus the recipe's with its interval."""
    told = {}
    for name, arm in found["arms"].items():
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
        told[name] = {
            "recipe": {"learning_rate": own.learning_rate, "test": values[name]},
            "scan": {"learning_rate": arm["best"], "test": values[f"{name}-scan"]},
            "metric": recipe.metric,
            "steps": runs[name][0].data["training"]["steps"],
            **difference.to_dict(),
            "margin": margin,
            "verdict": verdict(difference, margin, recipe.higher_is_better),
        }
    return told


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"Error: {error}") from None
