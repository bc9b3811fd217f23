"""Reproduce a run: train it again from its recipe.yaml and compare the metrics with those of its run.json."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import pandas

from peft_recipes.adapters.base_folder import run_files
from peft_recipes.adapters.saved import RECIPE_FILE
from peft_recipes.catalog.changes import apply_changes
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.publishing.tolerance import MetricComparison, changed_conditions, compare_metrics, example_scores
from peft_recipes.recipe.benchmarks import is_file
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output
from peft_recipes.runs.folder import BASE, RUN_FILE, Run, read_run, resolved_recipe, run_folder

_PREDICTIONS = "predictions.parquet"
# The files that are downloaded from a repository: the evidence, not the weights.
_EVIDENCE = [RUN_FILE, RECIPE_FILE, _PREDICTIONS]
_COUNTS = "training"  # the `split` of the rows that are counts: steps, trained parameters


@dataclass
class Reproduction:
    """The result of `reproduce`: a row per figure.

    differs: the conditions (machine, versions, data) that are not those of the original run. doubts: why the evidence
    can't be trusted: part of it is missing, or contradicts another part. folder: of the new run; None if not kept.
    """

    adapter: str
    arm: str
    seed: int
    rows: list[MetricComparison]
    differs: list[str]
    doubts: list[str]
    folder: Path | None

    @property
    def held(self) -> bool:
        """Whether all figures that could be compared agree, among them at least one metric, and there are no doubts."""
        compared = [row for row in self.rows if row.held is not None]
        has_metric = any(row.split != _COUNTS for row in compared)
        return has_metric and all(row.held for row in compared) and not self.doubts

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        data = {**vars(self), "rows": [asdict(row) for row in self.rows], "folder": self.folder and str(self.folder)}
        return {**data, "same_conditions": not self.differs, "held": self.held}


def reproduce(
    adapter: str | Path,
    *,
    output: str | Path | None = None,
    changes: Iterable[str] = (),
    trust_remote_code: bool = False,
    quiet: bool = True,
) -> Reproduction:
    """Train a run again, with the same arm and seed, and compare every metric with its run.json.

    adapter: the folder of a run, or its repository on the Hub, from which only the evidence is downloaded. output: keep
    the new run there; without it, the run is deleted. changes: "KEY=VALUE", for paths that differ on this machine
    (model=..., dataset.path=...). Code of a repository runs only with trust_remote_code, whatever its recipe says.
    Raises RecipeError if there is no such run, or its recipe can't be run here.
    """
    folder = run_files(adapter, _EVIDENCE)
    original = _read_evidence(folder)
    recipe = _recipe_for_this_machine(folder, original, list(changes), trust_remote_code)
    if output is not None:
        check_output(Path(output))
        new = _train(recipe, original, Path(output), quiet)
        return _compare(str(adapter), original, new, recipe.task, new.folder)
    with tempfile.TemporaryDirectory(prefix="peft-recipes-") as temporary:
        new = _train(recipe, original, Path(temporary), quiet)
        return _compare(str(adapter), original, new, recipe.task, None)


def _read_evidence(folder: Path) -> Run:
    """Read the original run. Raises RecipeError if the folder has no finished run of peft-recipes."""
    if (folder / "comparison.json").is_file() and not (folder / RUN_FILE).is_file():
        below = sorted(str(path.parent) for path in folder.glob(f"*/*/{RUN_FILE}"))
        raise RecipeError(f"{folder} is a comparison. Name one of its runs{f': {below[0]}, ...' if below else '.'}")
    run = read_run(folder)
    if run is None:
        raise RecipeError(f"{folder} has no {RUN_FILE}: there is no evidence to compare with.")
    if not run.ok:
        raise RecipeError(f"{folder / RUN_FILE}: the run is not a finished one ({run.data.get('status')}).")
    missing = [key for key in ("arm", "seed", "metrics", "environment") if key not in run.data]
    if missing:
        raise RecipeError(f"{folder / RUN_FILE} lacks '{missing[0]}': it was not written by peft-recipes.")
    return run


def _recipe_for_this_machine(folder: Path, run: Run, changes: list[str], trust_remote_code: bool) -> Recipe:
    """Read the run's recipe; set the number of threads of the original run, if this machine has as many."""
    recipe = resolved_recipe(folder / RECIPE_FILE)
    if run.data["arm"] not in (*recipe.arms, BASE):
        raise RecipeError(unknown("arm", run.data["arm"], recipe.arms, str(folder / RECIPE_FILE)))
    functions = [path for path in (recipe.score, recipe.reward) if path]
    if functions and not trust_remote_code:
        raise RecipeError(
            f"{folder / RECIPE_FILE} scores answers with the function {functions[0]}, which would run here. Read "
            "it, and pass --trust-remote-code if you trust it."
        )
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    environment = run.data["environment"]
    threads = environment.get("threads")
    if recipe.threads is None and environment.get("device") == "cpu" and isinstance(threads, int):
        settings |= {"threads": threads} if 1 <= threads <= (os.cpu_count() or 1) else {}
    files = [benchmark for benchmark in recipe.benchmarks if is_file(benchmark)]
    if files and not trust_remote_code and not any(change.startswith("benchmarks=") for change in changes):
        raise RecipeError(
            f"{folder / RECIPE_FILE} names files of benchmarks, which may run code: {', '.join(files)}. If you trust "
            "them, add --trust-remote-code; or leave benchmarks out with --set benchmarks=[]."
        )
    settings["training"] = {"report_to": "none"}  # the original run is in its trackers
    recipe = recipe.with_changes(settings)
    return apply_changes(recipe, changes) if changes else recipe


def _train(recipe: Recipe, original: Run, output: Path, quiet: bool) -> Run:
    from peft_recipes.training.run import train

    arm, seed = original.data["arm"], original.data["seed"]
    folder = run_folder(output, recipe, arm, seed)
    if folder.resolve() == original.folder.resolve():
        raise RecipeError(f"--output {output}: the evidence itself lies there ({folder}). Name another folder.")
    if (folder / RUN_FILE).is_file():
        raise RecipeError(f"{folder} holds a run already. Name another --output, or delete it.")
    return train(recipe, arm, seed=seed, output=output, resume=True, quiet=quiet)


def _compare(adapter: str, original: Run, new: Run, task: str, folder: Path | None) -> Reproduction:
    differs = changed_conditions(original.data["environment"], new.data["environment"])
    predictions, doubts = _read_predictions(original, task)
    rows = _compare_counts(original.data, new.data)
    left_out = set(original.data.get("benchmarks") or {}) - set(new.data["benchmarks"])
    metrics = {split: metrics for split, metrics in original.metrics.items() if split not in left_out}
    rows += compare_metrics(metrics, new.metrics, predictions, task, not differs)
    if predictions is None and differs:
        doubts.append(f"There is no {_PREDICTIONS}, and the conditions differ: nothing says how near is near.")
    return Reproduction(adapter, original.data["arm"], original.data["seed"], rows, differs, doubts, folder)


def _read_predictions(run: Run, task: str) -> tuple[pandas.DataFrame | None, list[str]]:
    """Read the original run's results by example, and report if they contradict its metrics: one was changed then."""
    path, metric = run.folder / _PREDICTIONS, run.data["metric"]
    if not path.is_file():
        return None, []
    try:
        table = pandas.read_parquet(path)
        scores = example_scores(table[table["split"] == "test"], metric, task)
    except (OSError, ValueError, KeyError) as error:
        return None, [f"{path.name} can't be read: {' '.join(str(error).split())[:200]}."]
    reported = run.metrics["test"].get(metric)
    if scores is None or reported is None:
        return table, []
    value = float(numpy.average(scores[0], weights=scores[1]))
    if abs(value - reported) <= 1e-4 * max(1.0, abs(reported)):
        return table, []
    return table, [f"{RUN_FILE} says {metric} {reported:.6g}, its own {_PREDICTIONS} gives {value:.6g}."]


def _compare_counts(original: dict[str, Any], new: dict[str, Any]) -> list[MetricComparison]:
    """Compare the counts that are equal on any machine."""
    rows = []
    for name, part, key in (("steps", "training", "steps"), ("trained parameters", "parameters", "trainable")):
        before, now = ((data.get(part) or {}).get(key) for data in (original, new))
        if before is not None:
            rows.append(MetricComparison(_COUNTS, name, before, now, (before, before), before == now))
    return rows
