"""A scan: find each arm's learning rate (and rank) by short runs within a time budget.

Runs train on the train split and are compared by validation loss; the test split is never read. Successive halving
(halving.py) stops the worse runs early. Their length follows from the budget and from step times measured first; a run
that would exceed the budget is not started, and one that is still going when it ends is stopped. The runs are trained
one after another in this process (here.py), or the arms at the same time: in several processes (local_trials.py), or on
a Ray cluster (remote_trials.py). scanner.py has the runs, results.py the files.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_recipes.comparison.places import RAY, check_place
from peft_recipes.distributed.jobs import AUTO, Jobs, check_jobs
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output, clear, make_folder
from peft_recipes.runs.lock import LOCK_FILES, locked
from peft_recipes.search.budget import Budget
from peft_recipes.search.candidates import candidates
from peft_recipes.search.here import Here
from peft_recipes.search.preparation import Preparation
from peft_recipes.search.results import FILE, FOLDER, Scan, read_scan
from peft_recipes.search.scanner import Scanner
from peft_recipes.search.trials import FOLDER as TRIALS
from peft_recipes.search.trials import Scanned, Trials
from peft_recipes.training.interruption import terminable
from peft_recipes.training.resolve import with_precision


def scan(
    recipe: Recipe,
    rates: Sequence[float] | None = None,
    arms: Iterable[str] | None = None,
    ranks: Sequence[int] | None = None,
    *,
    budget: float = 600.0,
    seed: int = 0,
    output: str | Path = "adapters",
    overwrite: bool = False,
    wait: bool = False,
    gone: float = 0.0,
    on: str = "local",
    address: str | None = None,
    jobs: Jobs | None = None,
    on_trial: Callable[[str, dict[str, Any], int, int], None] | None = None,
) -> Scan:
    """Try every arm (at every rank) at every learning rate; write scan.json, recipe.yaml and a plot to <recipe>/scan.

    A killed scan continues when it is called again, with the rest of its budget; a finished one is returned unchanged,
    unless a larger budget is given and runs are left.

    Args:
        rates: learning rates; None for a few around each arm's own.
        budget: seconds for everything, loading and the start of processes included.
        wait: wait until no other process writes to the folder.
        gone: seconds of the budget that were used before this call.
        on: where the runs are trained: "local", this machine, or "ray", the nodes of a Ray cluster.
        address: of the Ray cluster, as in `compare`.
        jobs: arms trained at a time on this machine, each in a process; with 1 all runs are trained in this process.
            "auto": as many as fit by their plans, at most one for each CPU core. None: "auto", on Apple's GPU 1. The
            result is the same.
        on_trial: called after each run with its arm, its entry of scan.json, its number and the number of runs.

    Raises:
        RecipeError: an argument is wrong; nothing has been written.
        KeyboardInterrupt, Terminated: after SIGINT or SIGTERM; finished runs are kept.
    """
    from peft_recipes.arms.selection import choose_arms

    if not math.isfinite(budget) or budget <= 0:
        raise RecipeError(f"budget: expected seconds above 0, got {budget}.")
    if recipe.task == "grpo":
        raise RecipeError("A scan chooses by the validation loss, which grpo has none of. Compare arms that differ in "
                          "their learning rate instead: the report has the validation rewards.")  # fmt: skip
    check_place(on, address)
    if jobs is not None:
        check_jobs(jobs)
        if on == RAY:
            raise RecipeError("--jobs counts the runs on this machine; with --on ray as many run at a time as the "
                              "nodes have CPUs and GPUs for: leave it out.")  # fmt: skip
    output, clock = Path(output), Budget(budget, gone)
    check_output(output)
    with contextlib.ExitStack() as stack:
        remote = None
        if on == RAY:
            from peft_recipes.search.remote_trials import RemoteTrials

            remote = stack.enter_context(RemoteTrials(address))
        folder = output / recipe.name / FOLDER
        chosen = choose_arms(recipe, arms)
        tried = candidates(chosen.recipe, chosen.names, rates, ranks)
        previous = None if overwrite else read_scan(folder / FILE)
        recipe = with_precision(chosen.recipe, folder if previous else None)
        prepared = Preparation(recipe, tried)
        prepared.prepare()
        at_a_time = 1 if remote else _at_a_time(jobs, prepared)
        if remote is None and (at_a_time == 1 or recipe.uses_stand_ins):
            prepared.load_base()
        scanner = Scanner(recipe, prepared, seed, clock, folder, on_trial or (lambda *_: None), notes=chosen.notes)
        if previous is not None and previous["signature"] != scanner.signature:
            raise RecipeError(
                f"{folder} holds a scan of another recipe, range, data or code. Replace it with --overwrite, or name "
                "another --output."
            )
        make_folder(folder)
        stack.enter_context(terminable())
        stack.enter_context(locked(folder, wait=wait))
        if previous is None:
            clear(folder, keep=LOCK_FILES)
        elif scanner.is_complete(previous):
            return Scan(previous, folder)
        shutil.rmtree(folder / TRIALS, ignore_errors=True)  # of a scan that was killed
        scanned = Scanned(recipe, prepared.candidates, folder, seed, clock)
        with contextlib.ExitStack() as trials_stack:
            trials: Trials
            if remote is not None:
                remote.begin(scanned)
                trials = remote
            elif at_a_time == 1:
                trials = trials_stack.enter_context(Here(prepared, clock))
            else:
                from peft_recipes.search.local_trials import LocalTrials

                trials = trials_stack.enter_context(LocalTrials(scanned, at_a_time))
            scanner.run(previous, trials)
        return scanner.finish()


def _at_a_time(jobs: Jobs | None, prepared: Preparation) -> int:
    """How many arms are trained at a time on this machine. Raises RecipeError where so many do not fit."""
    from peft_recipes.planning.together import check_together, jobs_for

    device, needs = prepared.hardware.device, list(prepared.needs.values())
    if jobs is None:
        jobs = 1 if device == "mps" else AUTO  # on a CPU, too: benchmarks/scan_jobs.json
    at_a_time = min(jobs_for(jobs, needs, device), len(prepared.candidates))
    if "memory" not in prepared.recipe.skip_checks:
        check_together(at_a_time, needs, device)
    return at_a_time
