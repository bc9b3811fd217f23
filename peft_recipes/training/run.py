"""Train one run in this process: one arm of a recipe with one seed, from resolving the recipe to writing run.json.

`train` is the public entry; `_run` calls the stages in order.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from peft_recipes.arms.selection import choose_arms
from peft_recipes.distributed import processes
from peft_recipes.distributed.batches import check_shardable, split_batch
from peft_recipes.errors import RecipeError
from peft_recipes.guards.runner import Guards
from peft_recipes.hardware.device import choose
from peft_recipes.kernels import allocator
from peft_recipes.measuring.disturbance import busy_since, read_counters
from peft_recipes.measuring.steps import Stopwatch
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs import facts
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import BASE, RUN_FILE, Run, check_free, finished, run_folder, signature
from peft_recipes.runs.progress import PAUSED
from peft_recipes.trackers.choice import check_trackers
from peft_recipes.training import kept, stages, tracking
from peft_recipes.training.interruption import Interruption, interruptible
from peft_recipes.training.pause import Pause, paused_run
from peft_recipes.training.resolve import report_notes, resolve, with_precision
from peft_recipes.training.setup import RunArguments, Setup

if TYPE_CHECKING:
    from peft_recipes.training.shared_base import Member


def train(
    recipe: Recipe,
    arm: str,
    *,
    seed: int = 0,
    output: str | Path = "adapters",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    data: str | Path | None = None,
    wait: bool = False,
    pause_at: int | None = None,
    shared: Member | None = None,
) -> Run:
    """Train one arm of a recipe with one seed in this process, and return its run.

    arm: a name among the recipe's arms or the table of methods, or "base" for the untrained base (evaluated only).
    resume: return a finished run of the same recipe, data and code as it is; continue an unfinished one from its last
    complete checkpoint. overwrite: train again whatever is there. data: the folder with the data that a comparison
    prepared for all its runs. wait: until no other process writes the folder. pause_at: the optimizer step after which
    the run pauses: it writes a checkpoint and its progress.json, with the validation split evaluated, and is returned
    with the status "paused"; a later call with `resume` continues it. Its figures are those of a run that was never
    paused. A run that can't be continued (AdaLoRA, a linear probe on cached features) does not pause.
    shared: of a run that shares its base with others of this process (together.py).

    Raises RecipeError for a user's mistake (then nothing is written), KeyboardInterrupt or Terminated after SIGINT or
    SIGTERM (a checkpoint is written before), and whatever stopped the run otherwise (run.json records it).

    Under `accelerate launch` every rank calls it and gets the same run; rank 0 prints, writes and accesses the Hub.
    Where one rank fails, that one raises what stopped it and the others `processes.OtherRankFailed`.
    """
    if arm not in (BASE, *recipe.arms):
        recipe = choose_arms(recipe, [arm]).recipe
        if arm not in recipe.arms:
            raise RecipeError(f"'{arm}' names many arms; a run is one. `peft-recipes compare --arms {arm}` trains all.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise RecipeError(f"seed: expected a whole number from 0 to {2**32 - 1}, got {seed!r}.")
    if pause_at is not None and pause_at < 1:
        raise RecipeError(f"pause_at: expected an optimizer step of 1 or more, got {pause_at}.")
    folder = run_folder(Path(output), recipe, arm, seed)
    options = (resume, wait, quiet, Path(data) if data else None, overwrite, pause_at, shared)
    arguments = RunArguments(arm, seed, folder, *options)
    sharded = arm in recipe.arms and recipe.arms[arm].method != "head"  # a linear probe computes its features once
    with processes.unsharded(not sharded), interruptible() as interruption:
        try:
            processes.join(choose(recipe.training, recipe.threads).device, interruption.ignore_first_signal)
            processes.from_rank_zero(lambda: check_free(Path(output), folder, resume, overwrite))
            split_batch(recipe.training, processes.count())
            check_shardable(recipe, arm, processes.distributed_type())
            if data is None:  # a comparison has asked, and a tracker that is gone by now is no reason to end a run
                processes.from_rank_zero(lambda: check_trackers(recipe.training))
            recipe = processes.from_rank_zero(lambda: with_precision(recipe, folder if resume else None))
            return _run(recipe, arguments, interruption)
        except Exception as error:
            raised = processes.report_failure(error)
            if raised is error:
                raise
            raise raised from error


def _run(recipe: Recipe, arguments: RunArguments, interruption: Interruption) -> Run:
    """Call the stages of a run in order; each is timed under its own name."""
    import transformers

    allocator.set_for_training()
    watch, guard, counters = Stopwatch(), Guards(recipe.skip_checks), read_counters()
    with watch("imports"):
        from peft_recipes.tasks.registry import task_of

        task_of(recipe)  # imports the task's trainer, whose time does not belong to the data
    with watch("data"):
        resolved = processes.local_rank_zero_first(lambda: resolve(recipe, [arguments.arm], data=arguments.data))
    if arguments.data is None and processes.is_rank_zero():  # a comparison says them itself, once
        report_notes(resolved.prepared)
    signed = signature(resolved.recipe, arguments.arm, arguments.seed, resolved.fingerprint)
    if arguments.resume and (done := processes.from_rank_zero(lambda: finished(arguments.folder, signed))):
        return done
    if arguments.resume and (paused := processes.from_rank_zero(lambda: _paused(arguments, signed))):
        return paused
    state = {"run": arguments, "interruption": interruption, "guard": guard, "watch": watch}
    state |= {"pause": Pause(arguments.pause_at), "warm": kept.is_warm()}
    setup = Setup(**vars(resolved), **state, signature=signed)
    setup.task.check_arguments(setup.arm, setup.hardware)
    with watch("plan"):
        setup.task.recipe = processes.from_rank_zero(lambda: stages.fit_to_memory(setup))
    transformers.set_seed(arguments.seed)  # for the head, the adapter and dropout; `data_seed` orders the examples
    with watch("load"):
        base, new_weights = stages.load_base(setup)
        stages.use_base(setup, base)
    setup.attention = getattr(base.config, "_attn_implementation", None)
    # Where rank 0 alone reads the base, the other ranks can't know its new weights.
    model, parameters = stages.apply(setup, base, processes.from_rank_zero(lambda: new_weights))
    if arguments.data is None and processes.count() == 1 and (busy := busy_since(counters)):
        logging.getLogger("peft_recipes").warning(busy)  # a comparison says it itself, once
        setup.prepared.notes.append(busy)
    with contextlib.ExitStack() as held:
        checkpoint = processes.from_rank_zero(lambda: stages.take_folder(setup, held))
        if isinstance(checkpoint, Run):  # another process finished it meanwhile
            return checkpoint
        try:
            data = stages.train_and_store(setup, model, parameters, checkpoint)
        except Exception as error:  # not Ctrl-C: an interrupted run is unfinished, not failed
            raise _failed(setup, error) from (error.__cause__ or error)
        if data["status"] == PAUSED:
            tracking.pause_session(setup)
            return Run(arguments.folder, data)
        data = processes.from_rank_zero(lambda: stages.finish(setup, data))
    return Run(arguments.folder, data)


def _paused(arguments: RunArguments, signed: str) -> Run | None:
    """The run of the folder if it has paused where this call would, or further on."""
    return paused_run(arguments.folder, signed, arguments.pause_at) if arguments.pause_at else None


def _failed(setup: Setup, error: Exception) -> Exception:
    """Record a failed run in run.json, and return what to raise for it."""
    setup.interruption.ignore_first_signal()  # the signal that ends the other ranks must not end this one
    raised = processes.report_failure(error)  # before run.json is written, which holds the first rank's message
    if processes.is_rank_zero():
        with contextlib.suppress(OSError):  # the disk may be full, which is what stopped it
            failure = facts.failure(error)
            if step := stages.completed_step(setup):
                failure["error"] += (
                    f" The training is complete: its checkpoint (step {step:,}) is kept, and a rerun uses it."
                )
            write_json(setup.run.folder / RUN_FILE, stages.run_facts(setup) | failure)
    if raised is error and isinstance(error, RecipeError):  # a run that failed midway, not a user's mistake
        return RuntimeError(str(error))
    return raised
