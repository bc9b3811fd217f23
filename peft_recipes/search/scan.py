"""A scan: find each arm's learning rate (and rank) by short runs within a time budget.

Runs train on the train split and are compared by validation loss; the test split is never read. Successive halving
(halving.py) stops the worse runs early. Their length follows from the budget and from step times measured first; a run
that would exceed the budget is not started. All runs of a scan run one after another in this process, or, on a Ray
cluster, the arms at the same time (remote_trials.py). scanner.py has the runs, results.py the files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.comparison.places import RAY, check_place
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output, clear, make_folder
from peft_recipes.runs.lock import LOCK_FILES, locked
from peft_recipes.search.budget import Budget
from peft_recipes.search.candidates import candidates
from peft_recipes.training.interruption import terminable
from peft_recipes.training.resolve import with_precision

if TYPE_CHECKING:
    pass

from peft_recipes.search.results import FILE, FOLDER, Scan, read_scan
from peft_recipes.search.scanner import Scanner


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
    on_trial: Callable[[str, dict[str, Any], int, int], None] | None = None,
) -> Scan:
    """Try every arm (at every rank) at every learning rate; write scan.json, recipe.yaml and a plot to <recipe>/scan.

    A killed scan continues when it is called again, with the rest of its budget; a finished one is returned unchanged,
    unless a larger budget is given and runs are left.

    Args:
        rates: learning rates; None for a few around each arm's own.
        budget: seconds for everything, loading included.
        wait: wait until no other process writes to the folder.
        gone: seconds of the budget that were used before this call.
        on: where the runs are trained: "local", this process, or "ray", the nodes of a Ray cluster.
        address: of the Ray cluster, as in `compare`.
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
    output = Path(output)
    check_output(output)
    with contextlib.ExitStack() as stack:
        remote = None
        if on == RAY:
            from peft_recipes.search.remote_trials import RemoteTrials

            remote = stack.enter_context(RemoteTrials(address))
        folder, clock = output / recipe.name / FOLDER, Budget(budget, gone)
        chosen = choose_arms(recipe, arms)
        tried = candidates(chosen.recipe, chosen.names, rates, ranks)
        previous = None if overwrite else read_scan(folder / FILE)
        recipe = with_precision(chosen.recipe, folder if previous else None)
        scanner = Scanner(recipe, tried, seed, clock, folder, on_trial or (lambda *_: None))
        scanner.prepare(load_base=remote is None)
        scanner.notes += chosen.notes
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
        scanner.run(previous, remote)
        return scanner.finish()
