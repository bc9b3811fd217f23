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

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_recipes.arms.selection import choose_arms
from peft_recipes.comparison.by_hand import Team
from peft_recipes.comparison.changes import Changes, read_changes
from peft_recipes.comparison.chunks import check_chunks
from peft_recipes.comparison.collecting import add_context, collect, first_finished
from peft_recipes.comparison.comparison import Comparison
from peft_recipes.comparison.course import Course
from peft_recipes.comparison.dropping import with_drop
from peft_recipes.comparison.executors import executor_of
from peft_recipes.comparison.judging import check_judged
from peft_recipes.comparison.orders import Order, Progress
from peft_recipes.comparison.places import LOCAL
from peft_recipes.comparison.provisional import Provisional
from peft_recipes.comparison.shared_runs import SharedRuns, check_shared
from peft_recipes.comparison.tracking import report_comparison
from peft_recipes.comparison.turns import measure_in_turns
from peft_recipes.comparison.until_decided import Until, check_plan, make_design
from peft_recipes.comparison.watch import watched
from peft_recipes.data.cache import stored
from peft_recipes.distributed.batches import check_shardable, split_batch
from peft_recipes.distributed.jobs import AUTO, Jobs
from peft_recipes.distributed.launch import Launch, check_installed, read_launch
from peft_recipes.embedded.cache import say
from peft_recipes.errors import RecipeError
from peft_recipes.inspection.summary import stored_summary
from peft_recipes.measuring.disturbance import busy_since, read_counters
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output, make_folder, write_json
from peft_recipes.runs.lock import locked
from peft_recipes.trackers.choice import check_trackers
from peft_recipes.training.interruption import terminable
from peft_recipes.training.resolve import memory_estimates, report_notes, resolve

_SEVERAL = 2  # runs at a time, or more: how many is not known


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
    share_base: bool = False,
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
        share_base: train the adapters' runs together on one base in one process, where that is exact; without
            `measure`, the first seed of every arm still runs alone, and its time and memory count.
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
    _report_changes(changes, names)
    check_judged(recipe, names)
    plan = None if until is None else check_plan(names, seeds, until)
    configuration = _read_launch(recipe, names, launch, processes, jobs)
    if measure and (launch is not None or on != LOCAL):
        option = "--launch" if launch is not None else f"--on {on}"
        raise RecipeError(f"--measure takes times in one process of this machine: leave out {option}, or --measure.")
    if share_base:
        check_shared(seeds if plan is None else plan.seeds, measure, on, launch, chunks)
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
        team = Team(recipe, names, seeds if plan is None else plan.seeds, estimates)
        make_folder(folder)
        with terminable(), locked(folder, wait=wait), stored(prepared, folder / ".data") as data:
            changes.begin(overwrite)
            design = None
            if plan is not None:
                design = make_design(folder, recipe, names, plan, resolved.fingerprint, overwrite=overwrite)
            at_once = _SEVERAL if on != LOCAL or jobs == AUTO or share_base else int(jobs)
            options = {"changes": changes, "design": design, "chunks": chunks, "at_once": at_once}
            shared = SharedRuns(estimates, None if measure else seeds[0]) if share_base else None
            options |= {"shared": shared, "launch": configuration, "overwrite": overwrite, "on_progress": on_progress}
            course = Course(executor, resolved, team, output, data, **options)
            recipe.to_yaml(course.yaml)
            context = {"estimates": estimates, "asked": asked, "looked": looked, "design": design}
            place = (course.live, recipe, names, folder, course.wanted, partial(add_context, **context), changes.halted)
            provisional = Provisional(*place, design=design, at_once=at_once, began=began)
            with watched(provisional.page, watch) as finish:
                with provisional:
                    busy = _warnings(counters, course.runs.missing(course.runs.jobs) if on == LOCAL else [])
                    notes = [*chosen.notes, *busy, *course.train(provisional, until, drop)]
                    recipe, names, seeds = team.recipe, team.names, course.seeds
                    if measure:
                        notes += measure_in_turns(first_finished(output, recipe, names, seeds), data)
                    if asked is not None and changes.added:  # what a suggested command must know
                        context["asked"] = {**asked, "added": [each["arm"] for each in changes.added]}
                    context |= {"on_reply": partial(_report_judging, on_progress, len(course.runs.jobs))}
                    context |= {"on_written": provisional.finish}
                    notes, halted = [*notes, *executor.notes], course.halted
                    comparison = collect(recipe, names, seeds, output, notes=notes, halted=halted, **context)
                finish((folder / "comparison.html").read_bytes())
            if failed := report_comparison(comparison, recipe, names, seeds):
                comparison.data["notes"] += [note for note in failed if note not in comparison.data["notes"]]
                write_json(folder / "comparison.json", comparison.data)
            return comparison


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
