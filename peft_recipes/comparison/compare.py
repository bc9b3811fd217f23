"""Compare the arms of a recipe: train each with each seed, and collect the runs into one table.

Which process does what:

- The caller's process (this file) checks the arguments, downloads and prepares the data once for all runs, submits them
  to an executor (executors.py), asks the judge, if there is one (judging.py), and computes the statistics, reports and
  cards at the end. It loads no weights but those of a local judge.
- The executor trains each run in a worker process of its own (worker.py): on this machine (pool.py), one after another
  or `jobs` at a time, under `launch` by one worker for each rank; or on the nodes of a Ray cluster (on_ray.py).
- After the runs, one more process reloads every trained adapter (adapters/check_process.py).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_recipes.arms.selection import choose_arms
from peft_recipes.comparison.by_hand import ByHand, Team, check_added
from peft_recipes.comparison.changes import Changes, read_changes
from peft_recipes.comparison.chunks import check_chunks, pause_steps
from peft_recipes.comparison.comparison import Comparison
from peft_recipes.comparison.dropping import Dropping, with_drop
from peft_recipes.comparison.executors import executor_of
from peft_recipes.comparison.judging import check_judged, judge_runs
from peft_recipes.comparison.live import Live
from peft_recipes.comparison.orders import Job, Order, Progress
from peft_recipes.comparison.places import LOCAL
from peft_recipes.comparison.pool import check_in_fresh_process
from peft_recipes.comparison.provisional import Provisional
from peft_recipes.comparison.requests import taking_requests
from peft_recipes.comparison.schedule import Schedule
from peft_recipes.comparison.tracking import report_comparison
from peft_recipes.comparison.turns import measure_in_turns
from peft_recipes.comparison.until_decided import Design, Until, add_seeds, check_plan, looked_at_before, make_design
from peft_recipes.comparison.watch import watched
from peft_recipes.data.cache import stored
from peft_recipes.distributed.batches import check_shardable, split_batch
from peft_recipes.distributed.jobs import AUTO, Jobs
from peft_recipes.distributed.launch import Launch, check_installed, read_launch
from peft_recipes.embedded.cache import say
from peft_recipes.errors import RecipeError
from peft_recipes.guards.runner import NOT_RUN
from peft_recipes.inspection.summary import stored_summary
from peft_recipes.measuring.disturbance import busy_since, read_counters, told_once
from peft_recipes.planning.plan import steps
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output, make_folder, write_json
from peft_recipes.runs.folder import BASE, Run, not_planned, read_run, run_folder, unfinished
from peft_recipes.runs.lock import locked
from peft_recipes.trackers.choice import check_trackers
from peft_recipes.training.interruption import terminable
from peft_recipes.training.resolve import memory_estimates, report_notes, resolve


def compare(
    recipe: Recipe,
    arms: Iterable[str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    output: str | Path = "adapters",
    overwrite: bool = False,
    wait: bool = False,
    launch: str | Path | None = None,
    processes: int | None = None,
    jobs: Jobs = 1,
    measure: bool = False,
    on: str = LOCAL,
    address: str | None = None,
    until: Until | None = None,
    chunks: int = 1,
    drop: bool = False,
    asked: dict[str, Any] | None = None,
    watch: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Train every arm with every seed, each run in a fresh process, and write comparison.json, .md and .html.

    The three are written anew while the runs are trained, marked as provisional (provisional.py).

    The untrained base is evaluated as well. Finished runs of the same recipe, data and code are kept; unfinished ones
    continue from their last checkpoint. A failed run is a row of the table and does not stop the others.

    Args:
        arms: names of the recipe's arms (default: all of them) or of the table of methods; "all" for all that fit.
        overwrite: train all runs again, from the start.
        wait: wait until no other process writes to the folder.
        launch: train each run under this Accelerate configuration: a shipped name ("ddp") or a file.
        processes: processes of each launched run (default: the configuration's).
        jobs: the most runs at a time, each on a GPU of its own, or sharing one or the CPU, which the notes then
            mention. A run starts only where its memory fits next to the others', by its plan. "auto": as many as fit,
            at most one for each CPU core.
        measure: take times, memory and latency again after the runs, alone, a few steps an arm, the arms taking turns.
        on: where the runs are trained: "local", this machine, or "ray", the nodes of a Ray cluster, one run each.
        address: of the Ray cluster: "ray://host:10001", "host:6379" or "auto" (default: the one of this machine).
        chunks: let the arms take turns: each is trained for one of so many equal shares of its steps, then the next.
        drop: stop the arms that are surely behind on validation (statistics/dropping.py); takes 8 chunks by default.
        until: add seeds until every arm has a verdict, by a plan that begins with `seeds` (until_decided.py).
        asked: the command line's arguments (recipe, embedded, changes, arms, output), for commands that the report
            suggests.
        watch: serve the page on this machine until the comparison ends; the address is printed to stderr.
        on_progress: called in this process whenever a run makes progress or ends.

    Raises:
        RecipeError: an argument or the recipe is wrong; nothing has been written.
        JudgeError: the judge of the answers can't be asked; the runs and its replies until then are kept.
        KeyboardInterrupt, Terminated: after SIGINT or SIGTERM, once the runs in progress have written a checkpoint.
    """
    counters, began = read_counters(), time.monotonic()
    seeds, output = _check_seeds(seeds), Path(output)
    chunks = with_drop(chunks) if drop else chunks
    check_chunks(chunks, recipe, on)
    folder = output / recipe.name
    changes = Changes(folder) if overwrite else read_changes(folder)
    chosen = choose_arms(changes.with_added(recipe), changes.names(arms))
    recipe, names = chosen.recipe, chosen.names
    check_judged(recipe, names)
    plan = None if until is None else check_plan(names, seeds, until)
    configuration = _read_launch(recipe, names, launch, processes, jobs)
    if measure and (launch is not None or on != LOCAL):
        option = "--launch" if launch is not None else f"--on {on}"
        raise RecipeError(f"--measure takes times in one process of this machine: leave out {option}, or --measure.")
    check_output(output)
    check_trackers(recipe.training, runs=1 + len(names) * len(seeds))
    with executor_of(on, address, jobs=jobs, launch=configuration) as executor:
        resolved = resolve(recipe, names, earlier=None if overwrite else folder)
        recipe, prepared = resolved.recipe, resolved.prepared
        if problems := prepared.interval_problems():
            raise RecipeError(*problems)
        report_notes(prepared)
        looked = stored_summary(resolved.task, prepared)
        estimates = memory_estimates(resolved, names, lambda arm: executor.spread_of(arm, resolved.hardware))
        make_folder(folder)
        # The untrained base is evaluated: about an arm's step without gradients and optimizer.
        base_memory = max(each["total"] - each["gradients"] - each["optimizer"] for each in estimates.values())
        base, planned = (BASE, seeds[0]), seeds if plan is None else plan.seeds
        jobs_planned: list[Job] = [base, *((arm, seed) for seed in planned for arm in names)]
        with terminable(), locked(folder, wait=wait), stored(prepared, folder / ".data") as data:
            changes.begin(overwrite)
            _report_changes(changes, names)
            design = None
            if plan is not None:
                design = make_design(folder, recipe, names, plan, resolved.fingerprint, overwrite=overwrite)
            yaml, team = folder / "recipe.yaml", Team(recipe, names, planned, estimates)
            recipe.to_yaml(yaml)

            def wanted() -> list[Job]:
                return [job for job in runs.jobs if job == base or design is None or design.may_need(*job)]

            several = 2  # or more: how many is not known
            at_once = several if on != LOCAL or jobs == AUTO else int(jobs)
            live = Live(recipe, output, wanted, at_once, on_progress)

            def order(job: Job, number: int) -> Order:
                place = (number, len(runs.jobs), live.see)
                memory = base_memory if job == base else team.estimates.get(job[0], {}).get("total", 0)
                options = {"data": data, "overwrite": overwrite, "launch": configuration, "memory_bytes": memory}
                return Order(output, team.recipe, job, yaml, *place, **options)

            pauses = None if chunks == 1 else pause_steps(steps(recipe, prepared.rows), chunks)
            runs = Schedule(executor, jobs_planned, order, resolved.fingerprint, pauses=pauses)
            runs.stopped |= changes.states
            context = {"estimates": team.estimates, "asked": asked, "looked": looked, "design": design}
            place = (live, recipe, names, folder, wanted, partial(_add_context, **context))
            provisional = Provisional(*place, design=design, at_once=at_once, began=began)
            with watched(provisional.page, watch) as finish:
                with provisional:
                    notes = [*chosen.notes, *_warnings(counters, runs.missing(jobs_planned) if on == LOCAL else [])]
                    with taking_requests(folder) as inbox:
                        checked = partial(check_added, executor, configuration, folder, data)
                        grow = partial(provisional.grow, team)
                        by_hand = ByHand(team, runs, changes, inbox, yaml, checked, design, grow)
                        runs.on_event = partial(_on_event, by_hand, provisional)
                        if drop:
                            runs.on_round = Dropping(team, runs, changes, pauses).after_round
                        if design is None:
                            runs.train(jobs_planned)
                            notes += looked_at_before(folder)
                        else:
                            read, look = partial(_run_or_failure, output, recipe), partial(_look, recipe, output, base)
                            train = lambda jobs: runs.train([base, *jobs])  # noqa: E731
                            add_seeds(design, until, runs.missing, train, read, look, runs.stopped)
                            seeds = design.run_seeds
                    executor.rest()
                    recipe, names = team.recipe, team.names
                    halted = changes.halted([job for job in runs.jobs if job[1] in seeds and job not in runs.done])
                    notes += [*team.notes, *changes.notes(names, {arm for arm, _ in halted})]
                    _check_adapters(output, recipe, [(arm, seed) for arm, seed in runs.jobs if seed in seeds])
                    if measure:
                        notes += measure_in_turns(_first_finished(output, recipe, names, seeds), data)
                    context |= {"on_reply": partial(_report_judging, on_progress, len(runs.jobs)), "halted": halted}
                    comparison = collect(recipe, names, seeds, output, notes=[*notes, *executor.notes], **context)
                finish((folder / "comparison.html").read_bytes())
            if failed := report_comparison(comparison, recipe, names, seeds):
                comparison.data["notes"] += [note for note in failed if note not in comparison.data["notes"]]
                write_json(folder / "comparison.json", comparison.data)
            return comparison


def _look(recipe: Recipe, output: Path, base: Job, design: Design) -> dict[str, Any]:
    """The differences of the arms from full by the seeds that each has so far, at a look of `design`."""
    from peft_recipes.statistics.differences import differences

    arms, seeds = design.data["arms"], design.run_seeds
    runs = _runs(output, recipe, arms, seeds, design, {})
    judge_runs(recipe, runs, _run_or_failure(output, recipe, base), output / recipe.name)
    return differences(recipe, runs, arms, seeds, plan=design.plan)


def _on_event(by_hand: ByHand, provisional: Provisional, ended: Order | None) -> None:
    by_hand.take_requests()
    provisional.ended(ended)


def _report_changes(changes: Changes, names: Sequence[str]) -> None:
    """Say which arms an earlier call stopped and added, before anything is trained."""
    if notes := changes.notes(names, names):
        say(f"Note: What was changed while an earlier call ran stays (--overwrite forgets it). {' '.join(notes)}")


def _report_judging(on_progress: Callable[[Progress], None] | None, jobs: int, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(Progress(("judge", 0), jobs, jobs, "running", done, total, "replies"))


def _warnings(counters: dict[str, float], orders: list[Order]) -> list[str]:
    """The warning of a machine that has been busy since `counters` were read, if there is something to train."""
    busy = busy_since(counters) if orders else None
    if busy:
        logging.getLogger("peft_recipes").warning(busy)
    return [busy] if busy else []


def _first_finished(output: Path, recipe: Recipe, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The first finished run of each arm."""
    runs = [[_run_or_failure(output, recipe, (arm, seed)) for seed in seeds] for arm in arms]
    return [next(run for run in each if run.ok) for each in runs if any(run.ok for run in each)]


def _check_seeds(seeds: Sequence[int]) -> list[int]:
    wrong = [seed for seed in seeds if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32]
    if wrong or not seeds:
        raise RecipeError(f"seeds: expected whole numbers of 0 or more, got {list(seeds)}.")
    return list(dict.fromkeys(seeds))


def _read_launch(
    recipe: Recipe, names: Sequence[str], launch: str | Path | None, processes: int | None, jobs: Jobs
) -> Launch | None:
    if launch is None:
        if processes is not None:
            raise RecipeError(f"--processes {processes} needs a launch configuration: add --launch ddp or fsdp2.")
        return None
    if jobs != 1:
        raise RecipeError("--launch and --jobs contradict each other: one run on all devices, or one device a run.")
    configuration = read_launch(launch, processes)
    check_installed(configuration)
    split_batch(recipe.training, configuration.processes)
    for arm in names:
        check_shardable(recipe, arm, configuration.distributed_type_of(recipe.arms[arm]))
    return configuration


def _check_adapters(output: Path, recipe: Recipe, jobs: list[Job]) -> None:
    """Reload every adapter that was not yet reloaded outside the process that trained it."""
    if {"reload", "fresh-process"} & set(recipe.skip_checks):
        return
    adapters = [job for job in jobs if job[0] != BASE and recipe.arms[job[0]].peft is not None]
    runs = [_run_or_failure(output, recipe, job) for job in adapters]
    unchecked = [run for run in runs if run.ok and not _checked_in_fresh_process(run)]
    check_in_fresh_process(unchecked, recipe.trust_remote_code)


def _checked_in_fresh_process(run: Run) -> bool:
    result = run.data["checks"].get("fresh-process", NOT_RUN)
    return not (isinstance(result, str) and result.startswith(NOT_RUN))


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
) -> Comparison:
    """Collect the runs below `output` into a Comparison; write its files and the runs' model cards.

    estimates: estimated memory of each arm. asked: how the comparison was called. notes: added to the runs' own.
    looked: what the data is, for the report.
    on_reply: called with the number of a judge's replies so far, and of its questions. design: of seeds that were added
    until it was decided; its intervals hold over all looks. halted: the state of each run that was not trained to its
    end, since its arm was stopped. Raises JudgeError.
    """
    from peft_recipes.cards.write import write_cards
    from peft_recipes.reporting.write import write_reports
    from peft_recipes.statistics.results import comparison_data

    folder = output / recipe.name
    runs = _runs(output, recipe, arms, seeds, design, halted or {})
    base = _run_or_failure(output, recipe, (BASE, seeds[0]))
    judged = judge_runs(recipe, runs, base, folder, on_reply)
    data = comparison_data(recipe, runs, base, list(arms), list(seeds), design.plan if design else None)
    _add_context(data, estimates=estimates, asked=asked, notes=notes, looked=looked, design=design)
    if judged is not None:
        data["judge"] = judged
    write_json(folder / "comparison.json", data)
    write_reports(data, folder)
    write_cards(data, folder)
    return Comparison(data, folder)


def _add_context(
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


def _runs(
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
        return _run_or_failure(output, recipe, job)

    return {job: run(job) for job in ((arm, seed) for arm in arms for seed in seeds)}


def _run_or_failure(output: Path, recipe: Recipe, job: Job) -> Run:
    folder = run_folder(output, recipe, *job)
    missing = {"status": "failed", "error": "There is no run in its folder.", "arm": job[0], "seed": job[1]}
    return read_run(folder) or Run(folder, missing)
