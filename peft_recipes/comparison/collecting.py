"""Collect the runs of a comparison into its table: comparison.json, the reports and the model cards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_recipes.comparison.comparison import Comparison
from peft_recipes.comparison.judging import judge_runs
from peft_recipes.comparison.orders import Job
from peft_recipes.comparison.until_decided import Design
from peft_recipes.measuring.disturbance import told_once
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import BASE, Run, not_planned, read_run, run_folder, unfinished


def collect(
    recipe: Recipe,
    arms: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    *,
    estimates: dict[str, Any] | None = None,
    asked: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    looked: dict[str, Any] | None = None,
    on_reply: Callable[[int, int], None] | None = None,
    design: Design | None = None,
    halted: Mapping[Job, dict[str, Any]] | None = None,
    on_written: Callable[[], None] = lambda: None,
) -> Comparison:
    """Collect the runs below `output` into a Comparison; write its files and the runs' model cards.

    estimates: estimated memory of each arm. asked: how the comparison was called. notes: added to the runs' own.
    looked: what the data is, for the report.
    on_reply: called with the number of a judge's replies so far, and of its questions. design: of seeds that were added
    until it was decided; its intervals hold over all looks. halted: the state of each run that was not trained to its
    end, since its arm was stopped. on_written: called once comparison.json is written, before the reports. Raises
    JudgeError.
    """
    from peft_recipes.cards.write import write_cards
    from peft_recipes.reporting.write import write_reports
    from peft_recipes.statistics.results import comparison_data

    folder = output / recipe.name
    runs = runs_of(output, recipe, arms, seeds, design, halted or {})
    base = run_or_failure(output, recipe, (BASE, seeds[0]))
    judged = judge_runs(recipe, runs, base, folder, on_reply)
    data = comparison_data(recipe, runs, base, list(arms), list(seeds), design.plan if design else None)
    add_context(data, estimates=estimates, asked=asked, notes=notes, looked=looked, design=design)
    if judged is not None:
        data["judge"] = judged
    write_json(folder / "comparison.json", data)
    on_written()
    write_reports(data, folder)
    write_cards(data, folder)
    return Comparison(data, folder)


def add_context(
    data: dict[str, Any],
    *,
    estimates: dict[str, Any] | None,
    asked: dict[str, Any] | None,
    looked: dict[str, Any] | None,
    design: Design | None,
    notes: Sequence[str] = (),
) -> None:
    """Add to comparison.json what its runs don't know; the arguments are those of `collect`."""
    data["asked"] = asked
    if design is not None:
        data["design"] = copy.deepcopy(design.data)
    data["notes"] = told_once([*data["notes"], *notes])
    if looked is not None:
        data["data"] = looked
    for arm, estimate in (estimates or {}).items():
        data["arms"][arm]["estimated_memory"] = estimate


def runs_of(
    output: Path,
    recipe: Recipe,
    arms: Sequence[str],
    seeds: Sequence[int],
    design: Design | None,
    halted: Mapping[Job, dict[str, Any]],
) -> dict[Job, Run]:
    """The run of each arm and seed; of an arm that got no more seeds, one that was not planned, or was halted."""

    def run(job: Job) -> Run:
        if job in halted:
            return Run(run_folder(output, recipe, *job), unfinished(*job, **halted[job]))
        if design is not None and not design.due(*job):
            return Run(run_folder(output, recipe, *job), not_planned(*job))
        return run_or_failure(output, recipe, job)

    return {job: run(job) for job in ((arm, seed) for arm in arms for seed in seeds)}


def run_or_failure(output: Path, recipe: Recipe, job: Job) -> Run:
    folder = run_folder(output, recipe, *job)
    missing = {"status": "failed", "error": "There is no run in its folder.", "arm": job[0], "seed": job[1]}
    return read_run(folder) or Run(folder, missing)


def first_finished(output: Path, recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The first finished run of each arm."""
    runs = [[run_or_failure(output, recipe, (arm, seed)) for seed in seeds] for arm in arms]
    return [next(run for run in each if run.ok) for each in runs if any(run.ok for run in each)]
