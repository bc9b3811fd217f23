"""Many runs of one recipe, each in a fresh process; finished ones are not repeated; collected into one honest table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_recipes.arms.selection import choose_arms
from peft_recipes.comparison.comparison import Comparison
from peft_recipes.comparison.pool import Job, Order, Progress, check_in_fresh_process, run_in_fresh_processes, teller
from peft_recipes.data.cache import stored
from peft_recipes.distributed.batches import check_shardable, split_batch
from peft_recipes.distributed.launch import Launch, check_installed, job_environments, read_launch
from peft_recipes.errors import RecipeError
from peft_recipes.planning.memory import spread_of
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output, make_folder, write_json
from peft_recipes.runs.folder import BASE, Run, read_run, run_folder, signature
from peft_recipes.runs.lock import locked
from peft_recipes.training.interruption import terminable
from peft_recipes.training.resolve import memory_estimates, resolve


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
    jobs: int = 1,
    asked: dict[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Trains every arm with every seed, each in a fresh process, and writes comparison.json, .md and .html.

    arms: names (default: all of the recipe's), as `arm_names.choose_arms` takes them: also the table's, also "all". The
    untrained base is evaluated as well. Runs that are finished and whose recipe, data and code are the same are kept,
    unfinished ones go on from their last checkpoint; overwrite trains them anew. wait: until no other process writes
    the folder. launch: the name or file of an Accelerate configuration under which each run is trained, by so many
    `processes` (default: the file's). jobs: how many runs at a time, each on a GPU of its own, or sharing the CPU,
    which the notes then say. asked: how the command line was called (recipe, embedded, changes, arms, output), so that
    what the report suggests is that call with a change. A run that fails is a row of the table, not the end. Raises
    RecipeError, before anything is written, for whatever is wrong with what was given; KeyboardInterrupt or Terminated
    after SIGINT or SIGTERM, when the run under way has written a checkpoint.
    """
    seeds = _chosen_seeds(seeds)
    chosen = choose_arms(recipe, arms)
    recipe, names = chosen.recipe, chosen.names
    launched, places = _chosen_launch(recipe, names, launch, processes, jobs), job_environments(jobs)
    output = Path(output)
    check_output(output)
    folder = output / recipe.name
    resolved = resolve(recipe, names, earlier=None if overwrite else folder)
    recipe, prepared = resolved.recipe, resolved.prepared
    estimates = memory_estimates(resolved, names, lambda arm: spread_of(arm, resolved.hardware, launched, jobs))
    make_folder(folder)
    todo: list[Job] = [(BASE, seeds[0]), *((arm, seed) for seed in seeds for arm in names)]
    with terminable(), locked(folder, wait=wait), stored(prepared, folder / ".data") as data:
        recipe.to_yaml(folder / "recipe.yaml")
        orders = []
        for number, job in enumerate(todo, 1):
            tell = teller(on_progress, job, number, len(todo))
            if _finished(output, recipe, job, prepared.fingerprint, launched) and not overwrite:
                tell("kept")
            else:
                orders.append(
                    Order(output, recipe, job, folder / "recipe.yaml", tell, data, anew=overwrite, launch=launched)
                )
        run_in_fresh_processes(orders, places)
        _check_adapters(output, recipe, todo)
        known = {"estimates": estimates, "asked": asked, "notes": chosen.notes}
        return collect(recipe, names, seeds, output, known)


def _chosen_launch(
    recipe: Recipe, names: Sequence[str], launch: str | Path | None, processes: int | None, jobs: int
) -> Launch | None:
    if launch is None:
        if processes is not None:
            raise RecipeError(f"--processes {processes}: say how they share the work, too: --launch ddp, or fsdp2.")
        return None
    if jobs != 1:
        raise RecipeError("--launch and --jobs contradict each other: one run on all devices, or one device a run.")
    chosen = read_launch(launch, processes)
    check_installed(chosen)
    split_batch(recipe.training, chosen.processes)
    for arm in names:
        check_shardable(recipe, arm, chosen.distributed_type_of(recipe.arms[arm]))
    return chosen


def _check_adapters(output: Path, recipe: Recipe, jobs: list[Job]) -> None:
    """Every adapter of a finished run is loaded once in another process than the one that trained it."""
    if {"reload", "fresh-process"} & set(recipe.skip_checks):
        return
    adapters = [job for job in jobs if job[0] != BASE and recipe.arms[job[0]].peft is not None]
    runs = [_run_or_failure(output, recipe, job) for job in adapters]
    unchecked = [run for run in runs if run.ok and "fresh-process" not in run.data["checks"]]
    check_in_fresh_process(unchecked, recipe.trust_remote_code)


def collect(
    recipe: Recipe,
    arms: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    known: dict[str, Any] | None = None,
) -> Comparison:
    """The comparison of the runs that lie below `output`, written to their recipe's folder, and the runs' cards.

    known: what the runs do not: "estimates", each arm's memory by the plan, "asked", how the comparison was called, and
    "notes" beside the runs' own.
    """
    from peft_recipes.cards.write import write_cards
    from peft_recipes.reporting.write import write_reports
    from peft_recipes.statistics.results import comparison_data

    folder = output / recipe.name
    runs = {(arm, seed): _run_or_failure(output, recipe, (arm, seed)) for arm in arms for seed in seeds}
    base = _run_or_failure(output, recipe, (BASE, seeds[0]))
    data = comparison_data(recipe, runs, base, list(arms), list(seeds))
    known = known or {}
    data["asked"] = known.get("asked")
    data["notes"] += known.get("notes") or []
    for arm, estimate in (known.get("estimates") or {}).items():
        data["arms"][arm]["estimated_memory"] = estimate
    write_json(folder / "comparison.json", data)
    write_reports(data, folder)
    write_cards(data, folder)
    return Comparison(data, folder)


def _chosen_seeds(seeds: Sequence[int]) -> list[int]:
    wrong = [seed for seed in seeds if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32]
    if wrong or not seeds:
        raise RecipeError(f"seeds: expected whole numbers of 0 or more, got {list(seeds)}.")
    return list(dict.fromkeys(seeds))


def _finished(output: Path, recipe: Recipe, job: Job, fingerprint: str, launch: Launch | None) -> bool:
    """Whether a run need not be done again: the same recipe, data and code, by as many processes."""
    run = read_run(run_folder(output, recipe, *job))
    if run is None or not run.ok or run.data.get("signature") != signature(recipe, *job, fingerprint):
        return False
    where = run.data["environment"]
    wanted = (launch.processes, launch.distributed_type_of(recipe.arms.get(job[0]))) if launch else (1, None)
    return (where.get("processes", 1), where.get("distributed")) == wanted


def _run_or_failure(output: Path, recipe: Recipe, job: Job) -> Run:
    folder = run_folder(output, recipe, *job)
    run = read_run(folder)
    missing = {"status": "failed", "error": "There is no run in its folder.", "arm": job[0], "seed": job[1]}
    return run if run is not None else Run(folder, missing)
