"""Combine run.json files into a comparison: means over seeds, paired differences with intervals, verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from peft_recipes.recipe.arm import rank_of
from peft_recipes.recipe.metrics import margin_for
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import GIVEN_UP, TO_COME, UNFINISHED, Run
from peft_recipes.statistics import conditions
from peft_recipes.statistics.differences import FULL, difference, differences
from peft_recipes.statistics.disagreements import answers_cut_at, disagreements
from peft_recipes.statistics.forgetting import forgetting
from peft_recipes.statistics.ranks import rank_groups, rank_verdicts
from peft_recipes.statistics.sequential import SequentialPlan

_CURVE_POINTS = 200  # the most per curve in comparison.json


def comparison_data(
    recipe: Recipe,
    runs: dict[tuple[str, int], Run],
    base: Run,
    arms: Sequence[str],
    seeds: Sequence[int],
    plan: SequentialPlan | None = None,
    compared: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the contents of comparison.json for the runs of one recipe, keyed by (arm, seed).

    Runs may be unfinished. plan: of seeds that were added until it was decided; then the intervals hold over all of its
    looks. compared: the seeds that intervals are made of (default: all); between two looks those of the last one.
    """
    compared = seeds if compared is None else compared
    timed = {arm: _timed([runs[arm, seed] for seed in seeds if runs[arm, seed].ok]) for arm in arms}
    timings = conditions.timing(timed, FULL)
    table = {
        arm: _arm(recipe, arm, {seed: runs[arm, seed] for seed in seeds}, timed[arm], timings.get(arm)) for arm in arms
    }
    finished = [run for run in (base, *runs.values()) if run.ok]
    first = finished[0].data if finished else {"rows": {}, "samples": None, "environment": {}}
    full = table.get(FULL)
    margin = recipe.margin or margin_for(recipe.metric, full["metric"]["mean"] if full and full["metric"] else 1.0)
    return {
        "schema": 1,
        "recipe": recipe.name,
        "title": recipe.title,
        "task": recipe.task,
        "embedded": recipe.uses_stand_ins,
        "model": recipe.model,
        "dataset": recipe.data_name,
        "metric": recipe.metric,
        "selection_metric": recipe.selection_metric,
        "higher_is_better": recipe.higher_is_better,
        "margin": margin,
        "rows": first["rows"],
        "seeds": list(seeds),
        "base": _base(base),
        "arms": table,
        "differences": differences(recipe, runs, arms, compared, margin, plan),
        "ranks": _ranks(recipe, runs, table, arms, compared, margin, plan),
        "rank_groups": rank_groups({arm: recipe.arms[arm] for arm in arms}),
        "forgetting": forgetting(recipe, runs, base, arms, compared, plan),
        "disagreements": disagreements(recipe, runs, arms, seeds, FULL) if full else {},
        "answers_cut_at": answers_cut_at(finished),
        "samples": first["samples"],
        "environment": first["environment"],
        "notes": _notes(recipe, finished) + conditions.notes(timings, timed),
    }


def _timed(runs: list[Run]) -> list[Run]:
    """Return the runs whose times count: those that `--measure` took again, with its figures, else all."""
    again = [run for run in runs if run.data.get("measured")] or runs
    return [Run(run.folder, conditions.timed(run.data)) for run in again]


def _notes(recipe: Recipe, runs: list[Run]) -> list[str]:
    # Of an arm that `--measure` took again, no time comes from runs that shared the machine.
    again = {run.data.get("arm") for run in runs if run.data.get("measured")}
    noted = ((run.data.get("arm"), note) for run in runs for note in run.data["notes"])
    notes = list(dict.fromkeys(note for arm, note in noted if arm not in again or conditions.SHARED not in note))
    if recipe.task in ("text-classification", "token-classification") and not recipe.evaluate_also:
        notes.append(
            "Forgetting is not measured: the base has no head for these classes before tuning, so there is no score "
            "to compare with. To measure it, name a set that the base has a head for under evaluate_also."
        )
    return notes


def _base(run: Run) -> dict[str, Any]:
    if not run.ok:
        return {"status": run.data["status"], "error": run.data["error"], "metrics": {}, "answers": None}
    return {
        "status": "ok",
        "error": None,
        "metrics": run.metrics,
        "per_class": run.data["per_class"],
        "total_parameters": run.data["parameters"]["total"],
        "parameters_by_component": run.data["parameters"]["by_component"],
        "answers": run.data["answers"],
        "failed_checks": _failed_checks([run]),
    }


def _failed_checks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The checks that failed after training, by seed: the figures are kept, and the reports say so."""
    return [
        {"seed": run.data["seed"], "check": name, "error": words}
        for run in runs
        for name, words in run.failed_checks.items()
    ]


def _arm(
    recipe: Recipe, name: str, runs: dict[int, Run], timed: list[Run], timing: dict[str, Any] | None
) -> dict[str, Any]:
    """Return one arm's entry: its configuration, means of its metrics, medians of its costs.

    timed: its finished runs with the figures of `--measure`; timing: which of them count, and how.
    """
    arm, finished = recipe.arms[name], {seed: run for seed, run in runs.items() if run.ok}
    failures = [
        {"seed": seed, "status": run.data["status"], "error": run.data["error"]}
        for seed, run in runs.items()
        if run.data["status"] not in ("ok", "not planned", *UNFINISHED)
    ]
    others = [run.data for run in runs.values() if run.data["status"] in UNFINISHED]
    if not (finished or failures or others):  # given up before its first seed, and taken up again for a later call
        others = [{"status": "stopped", "seed": seed} for seed in runs]
    targets = getattr(arm.peft, "target_modules", None)
    entry: dict[str, Any] = {
        "status": "ok" if finished else _status(others) if others else failures[0]["status"],
        "error": None if finished or others else failures[0]["error"],
        "seeds": list(finished),
        "failures": failures,
        "failed_checks": _failed_checks(list(finished.values())),
        "method": arm.method_name,
        "rank": rank_of(arm),
        "quantise": arm.quantise,
        "target_modules": [targets] if isinstance(targets, str) else sorted(targets) if targets else None,
        "learning_rate": arm.learning_rate,
    }
    if others:
        entry["unfinished"] = [{"seed": data["seed"], "state": data["status"]} for data in others]
    if not finished:
        return entry | dict.fromkeys(_MEASURED) | ({"progress": progress_of(recipe, others)} if others else {})
    counted = [run for run in timed if timing is None or run.data["seed"] in timing["seeds"]]
    return entry | _measured(recipe, list(finished.values()), counted) | {"timing": timing}


def _status(unfinished: Sequence[dict[str, Any]]) -> str:
    """The status of an arm without a finished run: "pending", or how it was given up."""
    states = [data["status"] for data in unfinished]
    return "pending" if set(states) & set(TO_COME) else next(state for state in GIVEN_UP if state in states)


def progress_of(recipe: Recipe, unfinished: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how far an arm without a finished run is: the run with the most steps, and the mean validation curve."""
    furthest = max(unfinished, key=lambda data: (data.get("step") or 0, data["status"] == "running"))
    by_step: dict[int, list[float]] = {}
    for data in unfinished:
        for point in data.get("validation") or []:
            if recipe.selection_metric in point:
                by_step.setdefault(point["step"], []).append(point[recipe.selection_metric])
    progress = {"state": furthest["status"], "step": furthest.get("step") or 0, "of": furthest.get("of") or None}
    progress["validation"] = [[step, statistics.fmean(values)] for step, values in sorted(by_step.items())]
    return progress | ({"reason": furthest["reason"]} if furthest.get("reason") else {})


def _measured(recipe: Recipe, runs: list[Run], timed: list[Run]) -> dict[str, Any]:
    """Return means over all runs, and medians of time, memory and latency over the `timed` ones."""
    first = runs[0].data
    values = [run.metrics["test"][recipe.metric] for run in runs if recipe.metric in run.metrics["test"]]

    def median(*path: str) -> float | None:
        values = [_at(run.data, path) for run in timed]
        return None if None in values else statistics.median(values)

    counts = first["parameters"]
    return {
        "trainable_parameters": counts["trainable"],
        "adapter_parameters": counts["adapter"],
        "head_parameters": counts["head"],
        "total_parameters": counts["total"],
        "checkpoint_bytes": int(median("checkpoint_bytes")),
        "steps": first["training"]["steps"],
        "metric": {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "values": values,
        }
        if values  # none of a win rate without a full run to win against
        else None,
        "metrics": _means([run.metrics for run in runs]),
        "training_seconds": median("training", "seconds"),
        "warmup_seconds": median("training", "warmup_seconds"),
        "total_seconds": median("seconds", "total"),
        "tokens_per_second": median("training", "tokens_per_second"),
        "examples_per_second": median("training", "examples_per_second"),
        "padding_share": median("training", "padding_share"),
        "peak_memory_bytes": int(median("training", "peak_memory_bytes")),
        "latency_ms": {form: median("latency_ms", form) for form in ("base", "adapter", "merged")},
        "generation_tokens_per_second": timed[0].data["generation_tokens_per_second"]
        and {form: median("generation_tokens_per_second", form) for form in ("base", "adapter", "merged")},
        "curves": [_curve(recipe, run) for run in runs],
        "per_class": _class_means([run.data["per_class"] for run in runs]) if first["per_class"] else None,
        "answers": first["answers"],
        "checks": first["checks"],
        "folder": f"{first['arm']}/seed-{first['seed']}",
        "notes": first["notes"],
    }


# The keys of `_measured`; null for an arm without a finished run.
_MEASURED = (
    "trainable_parameters", "adapter_parameters", "head_parameters", "total_parameters", "checkpoint_bytes", "steps",
    "metric", "metrics", "training_seconds", "warmup_seconds", "total_seconds", "tokens_per_second",
    "examples_per_second", "padding_share", "peak_memory_bytes", "latency_ms", "generation_tokens_per_second", "curves",
    "per_class", "answers", "checks", "folder", "notes", "timing",
)  # fmt: skip


def _at(data: Any, path: Sequence[str]) -> float | None:
    for key in path:
        data = None if data is None else data.get(key)
    return data


def _means(metrics: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        split: {
            name: statistics.fmean(m[split][name] for m in metrics)
            for name in metrics[0][split]
            if all(name in m[split] for m in metrics)
        }
        for split in metrics[0]
        if all(split in m for m in metrics)  # a further set may have failed to evaluate with one seed
    }


def _class_means(reports: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "label": same[0]["label"],
            **{k: statistics.fmean(row[k] for row in same) for k in ("precision", "recall", "f1")},
            "support": same[0]["support"],
        }
        for same in zip(*reports, strict=True)
    ]


def _curve(recipe: Recipe, run: Run) -> dict[str, Any]:
    training = run.data["training"]
    losses, size = training["losses"], math.ceil(len(training["losses"]) / _CURVE_POINTS) or 1
    bins = [losses[start : start + size] for start in range(0, len(losses), size)]
    return {
        "seed": run.data["seed"],
        "loss": [[points[-1][0], statistics.fmean(loss for _, loss in points)] for points in bins],
        "validation": [
            [p["step"], p[recipe.selection_metric]] for p in training["validation"] if recipe.selection_metric in p
        ],
    }


def _ranks(
    recipe: Recipe,
    runs: dict[tuple[str, int], Run],
    table: dict[str, dict[str, Any]],
    arms: Sequence[str],
    seeds: Sequence[int],
    margin: float,
    plan: SequentialPlan | None = None,
) -> list[dict[str, Any]]:
    """Compare the ranks of one arm and name the smallest that is enough."""
    validation = {
        arm: table[arm]["metrics"]["validation"][recipe.selection_metric]
        for arm in arms
        if "validation" in (table[arm]["metrics"] or {})
    }
    return rank_verdicts(
        recipe,
        arms,
        validation,
        lambda arm, best: difference(recipe, runs, arm, seeds, margin, best, plan=plan),
        margin,
    )
