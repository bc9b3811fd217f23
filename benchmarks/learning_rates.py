"""Which learning rate suits each arm of a recipe: short runs, judged on the validation split alone.

    python benchmarks/learning_rates.py mnist-shift --embedded full=1e-3,3e-3,1e-2 lora=3e-3,1e-2 --seeds 0,1

Prints one line a run and writes benchmarks/learning_rates/RECIPE.json. The test split's figures are neither read nor
kept here: a rate chosen by them would make the comparison's intervals untrue.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from peft_recipes import RecipeError, load_recipe
from peft_recipes.hardware import choose, environment
from peft_recipes.quiet import quiet_libraries
from peft_recipes.runs import read_run, run_folder, write_json
from peft_recipes.workers import run_in_fresh_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("rates", nargs="+", metavar="ARM=RATE,RATE")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--into", default=str(Path(__file__).parent / "learning_rates"))
    given = parser.parse_args()
    quiet_libraries()
    tried = {}
    with tempfile.TemporaryDirectory() as folder:
        for words in given.rates:
            arm, _, rates = words.partition("=")
            tried[arm] = [_tried(given, arm, rate, Path(folder)) for rate in rates.split(",")]
    name = given.recipe + ("-embedded" if given.embedded else "")
    path = Path(given.into) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = merged(json.loads(path.read_text()) if path.is_file() else {}, given, tried)
    write_json(path, found)
    print(json.dumps(found["best"]))


def merged(before: dict, given: argparse.Namespace, tried: dict[str, list[dict]]) -> dict:
    """What was found before, with what was tried now added; a rate that was tried again replaces its figures."""
    metric = load_recipe(given.recipe).metric
    rows = dict(before.get("tried", {}))
    for arm, new in tried.items():
        rates = {row["learning_rate"]: row for row in [*rows.get(arm, []), *new]}
        rows[arm] = [rates[rate] for rate in sorted(rates)]
    return {
        "recipe": given.recipe,
        "embedded": given.embedded,
        "changes": given.changes,
        "split": "validation",
        "metric": metric,
        "best": {arm: _best(tries, metric) for arm, tries in rows.items()},
        "tried": rows,
        "environment": environment(choose()),
    }


def _tried(given: argparse.Namespace, arm: str, rate: str, folder: Path) -> dict:
    """One rate of one arm, with every seed: its validation metrics."""
    changes = [*given.changes, f"arms.{arm}.learning_rate={rate}"]
    recipe = load_recipe(given.recipe, embedded=given.embedded, changes=changes)
    file = folder / "recipe.yaml"
    recipe.to_yaml(file)
    values = []
    for seed in (int(s) for s in given.seeds.split(",")):
        run_in_fresh_process(folder, recipe, (arm, seed), file, lambda *_, **__: None)
        run = read_run(run_folder(folder, recipe, arm, seed))
        values.append(run.metrics["validation"] if run is not None and run.ok else None)
    print(arm, rate, [None if v is None else round(v[recipe.metric], 4) for v in values], flush=True)
    return {"learning_rate": float(rate), "validation": values}


def _best(rows: list[dict], metric: str) -> float | None:
    """The rate with the best mean over seeds; a rate at which a run failed is no choice."""
    sound = {row["learning_rate"]: statistics.fmean(v[metric] for v in row["validation"])
             for row in rows if all(row["validation"])}  # fmt: skip
    if not sound:
        return None
    return (min if metric == "loss" else max)(sound, key=sound.get)


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"Error: {error}") from None
