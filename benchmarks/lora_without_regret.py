"""Does LoRA on all linear layers, at ten times full's learning rate, match full fine-tuning? Tested on our recipes.

    python benchmarks/lora_without_regret.py mnist-shift            # trains; three seeds

The claim is that of "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025) and of trl's page of that name.
For each recipe: full fine-tuning at the recipe's learning rate and its neighbours, further while the best is an edge;
LoRA (r=16, alpha=32, every linear and convolutional layer) at ten times full's best and at its neighbours, in the same
way. Learning rates are chosen on the validation split; claims come from the test split, paired by example and seed.
Prints the result as JSON; --keep writes benchmarks/lora_without_regret/RECIPE.json, from which `make readme` writes
docs/lora-without-regret.md.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from harness import result_parser, write_result

from peft_recipes import Arm, Recipe, RecipeError, load_recipe
from peft_recipes.distributed.quiet import quiet_libraries
from peft_recipes.hardware.device import choose
from peft_recipes.hardware.environment import environment
from peft_recipes.recipe.metrics import margin_for
from peft_recipes.runs.folder import Run, read_run, run_folder
from peft_recipes.statistics.bootstrap import paired_difference, verdict
from peft_recipes.statistics.scores import scores

FIGURES = Path(__file__).with_suffix("")
RANK, ALPHA, TIMES = 16, 32, 10
NEIGHBOUR = 3.0  # the factor between two learning rates
POWERS = {"full": (-1, 0, 1), "lora": (-2, -1, 0, 1)}  # of that factor: full around the recipe's, LoRA around ten times
MOST_FURTHER = 2  # steps beyond these while the best is an edge


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", default="runs/lora-without-regret", help="folder of the runs; finished ones are kept")
    given = parser.parse_args()
    quiet_libraries()
    result = run_recipe(given.recipe, given.changes, [int(s) for s in given.seeds.split(",")], Path(given.runs))
    summary = {key: result[key] for key in ("recipe", "best", "at_ten_times", "at_its_best")}
    write_result(given, FIGURES / f"{given.recipe}.json", result, summary)


def run_recipe(name: str, changes: list[str], seeds: list[int], output: Path) -> dict[str, Any]:
    """Do every run of one recipe and summarise them."""
    recipe = load_recipe(name, embedded=True, changes=changes)
    own = recipe.arms["full"].learning_rate
    full = _search(recipe, "full", own, seeds, output)
    best = _best(full, recipe)
    lora = _search(recipe, "lora", TIMES * best["learning_rate"], seeds, output)
    at_ten, own_best = next(row for row in lora if row["times"] == 1), _best(lora, recipe)
    margin = recipe.margin or margin_for(recipe.metric, statistics.fmean(best["test"]))
    reference = _runs(recipe, best["arm"], seeds, output)
    return {
        "recipe": name,
        "title": recipe.title,
        "model": recipe.model,
        "dataset": recipe.dataset.path,
        "changes": changes,
        "metric": recipe.metric,
        "margin": margin,
        "rows": reference[0].data["rows"],
        "steps": reference[0].data["training"]["steps"],
        "seeds": seeds,
        "rank": RANK,
        "alpha": ALPHA,
        "targets": sorted(_lora(recipe).target_modules),
        "trainable": {
            kind: _runs(recipe, row["arm"], seeds, output)[0].data["parameters"]["trainable"]
            for kind, row in (("full", best), ("lora", own_best))
        },
        "full": full,
        "lora": lora,
        "best": {"full": best["learning_rate"], "lora": own_best["learning_rate"]},
        "at_ten_times": {"learning_rate": at_ten["learning_rate"]}
        | _difference(recipe, _runs(recipe, at_ten["arm"], seeds, output), reference, margin),
        "at_its_best": {"learning_rate": own_best["learning_rate"]}
        | _difference(recipe, _runs(recipe, own_best["arm"], seeds, output), reference, margin),
        "environment": environment(choose(recipe.training)),
    }


def _search(recipe: Recipe, kind: str, middle: float, seeds: list[int], output: Path) -> list[dict[str, Any]]:
    """Rows of the middle learning rate, its neighbours, and further ones while the best is an edge; sorted."""
    rows = [_row(recipe, kind, middle, power, seeds, output) for power in POWERS[kind]]
    for _ in range(MOST_FURTHER):
        rows.sort(key=lambda row: row["learning_rate"])
        best = _best(rows, recipe)
        if best is rows[0]:
            rows.append(_row(recipe, kind, middle, rows[0]["power"] - 1, seeds, output))
        elif best is rows[-1]:
            rows.append(_row(recipe, kind, middle, rows[-1]["power"] + 1, seeds, output))
        else:
            break
    return sorted(rows, key=lambda row: row["learning_rate"])


def _row(recipe: Recipe, kind: str, middle: float, power: int, seeds: list[int], output: Path) -> dict[str, Any]:
    """Train one learning rate with every seed. It has no figures if a run fails (its loss is not finite)."""
    from peft_recipes import compare

    rate = float(f"{middle * NEIGHBOUR**power:.2g}")
    name = f"{kind}-{rate:g}"
    compare(_with_arm(recipe, kind, name, rate), [name], seeds, output=output, on_progress=_print_end)
    runs = [run for run in _runs(recipe, name, seeds, output) if run is not None and run.ok]
    complete = len(runs) == len(seeds)
    return {
        "arm": name,
        "learning_rate": rate,
        "power": power,
        "times": NEIGHBOUR**power,
        "validation": [run.metrics["validation"] for run in runs] if complete else None,
        "test": [run.metrics["test"][recipe.metric] for run in runs] if complete else None,
    }


def _with_arm(recipe: Recipe, kind: str, name: str, rate: float) -> Recipe:
    method = "full" if kind == "full" else _lora(recipe)
    return dataclasses.replace(recipe, arms={name: Arm(method, learning_rate=rate)}, embedded={})


def _lora(recipe: Recipe) -> Any:
    """LoRA on every linear and convolutional layer."""
    from peft import LoraConfig

    from peft_recipes.models import bases
    from peft_recipes.models.architectures import architecture_of

    row = architecture_of(bases.load_config(recipe))
    names = [*row.group("all-linear"), *row.group("convolutions")]
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)


def _print_end(progress: Any) -> None:
    if progress.state != "running":
        print(*progress.job, progress.state, progress.error, flush=True)


def _runs(recipe: Recipe, arm: str, seeds: list[int], output: Path) -> list[Run]:
    return [read_run(run_folder(output, recipe, arm, seed)) for seed in seeds]


def _best(rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """The row with the best mean on the validation split; ties are broken by the loss."""
    sound = [row for row in rows if row["validation"]]
    if not sound:
        raise RecipeError(f"No learning rate of {recipe.name} trained without failing.")
    sign = 1 if recipe.higher_is_better else -1

    def value(row: dict[str, Any]) -> tuple[float, float]:
        metric, loss = (statistics.fmean(v[key] for v in row["validation"]) for key in (recipe.metric, "loss"))
        return sign * metric, -loss

    return max(sound, key=value)


def _difference(recipe: Recipe, ours: list[Run], theirs: list[Run], margin: float) -> dict[str, Any]:
    """LoRA compared with full's best on the test split."""
    if not all(run.ok for run in ours):
        return {"mean": None, "verdict": "failed", "error": next(run.data["error"] for run in ours if not run.ok)}
    mine, other = ([scores(run, recipe) for run in runs] for runs in (ours, theirs))
    difference = paired_difference(
        np.stack([s for _, s, _ in mine]), np.stack([s for _, s, _ in other]), weights=mine[0][2]
    )
    mean = statistics.fmean(run.metrics["test"][recipe.metric] for run in ours)
    decision = verdict(difference, margin, recipe.higher_is_better)
    return {"mean": mean, **difference.to_dict(), "margin": margin, "verdict": decision}


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"Error: {error}") from None
