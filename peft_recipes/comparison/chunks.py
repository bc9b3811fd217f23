"""`--chunks`: the arms take turns, each trained for an equal share of its steps at a time.

A chunk ends with an exact checkpoint (training/pause.py), so a run's figures are those of a run without pauses, and all
arms have validation scores after the first turn of each.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_recipes.comparison.orders import Order
from peft_recipes.comparison.places import LOCAL
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import BASE, read_run
from peft_recipes.runs.progress import read_progress
from peft_recipes.training.pause import paused_run


def check_chunks(chunks: int, recipe: Recipe, on: str = LOCAL) -> None:
    """Raise RecipeError for a number of chunks that is none, and where runs can't take turns."""
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise RecipeError(f"--chunks {chunks}: expected a number of chunks of 1 or more, as in --chunks 8.")
    if on != LOCAL and chunks > 1:
        raise RecipeError(
            f"--chunks lets the arms take turns on this machine, and --on {on} trains them on several nodes at once: "
            "leave out one of them."
        )
    if recipe.dataset.streaming and chunks > 1:
        raise RecipeError(
            "--chunks continues each run several times, and with dataset.streaming each time would read the stream "
            "again from its beginning: leave out one of them."
        )


def pause_steps(steps: int, chunks: int) -> list[int]:
    """The optimizer steps after which a run of `steps` pauses; with more chunks than steps, after each."""
    return sorted({round(number * steps / chunks) for number in range(1, chunks)} - {0, steps})


def is_paused(order: Order) -> bool:
    """Whether the run is paused at the end of the order's chunk, or further on."""
    if order.pause_at is None or has_ended(order):
        return False
    return paused_run(order.folder, order.signature, order.pause_at) is not None


def has_ended(order: Order) -> bool:
    """Whether the run is finished or has failed."""
    return read_run(order.folder) is not None


def report_paused(order: Order) -> bool:
    """Report a run whose process has ended at a pause; return whether it has."""
    progress = read_progress(order.folder, order.signature) if order.pause_at is not None else None
    if progress is None or progress["step"] < order.pause_at:
        return False
    order.report("paused", step=progress["step"], steps=progress["of"])
    return True


def by_seed(orders: Sequence[Order]) -> list[list[Order]]:
    """The orders of the untrained base, then those of each seed."""
    groups: dict[int | str, list[Order]] = {}
    for order in orders:
        arm, seed = order.job
        groups.setdefault(BASE if arm == BASE else seed, []).append(order)
    return list(groups.values())
