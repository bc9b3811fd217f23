"""`--drop`: after each round of chunks, the arms that are surely behind on the validation split are trained no further.

The rule is in statistics/dropping.py. Here are its data, progress.parquet of the runs that are paused, and what a drop
does: the arm's checkpoints stay, and `peft-recipes add DIR ARM` takes it up again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peft_recipes.comparison.by_hand import Team
from peft_recipes.comparison.changes import DROP, Changes
from peft_recipes.comparison.orders import Order
from peft_recipes.comparison.schedule import Schedule
from peft_recipes.embedded.cache import say
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.metrics import METRICS, margin_for
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.progress import SCORES_FILE
from peft_recipes.statistics.differences import FULL
from peft_recipes.statistics.dropping import Behind, Race

CHUNKS = 8  # where --chunks is not given
_FEWEST_CHUNKS = 3  # one after which a drop is decided, one before, one that is saved

Scores = tuple[np.ndarray, np.ndarray]  # ids and scores of the validation examples


def with_drop(chunks: int) -> int:
    """The number of chunks of a comparison with `--drop`. Raises RecipeError for too few."""
    if chunks == 1:
        return CHUNKS
    if chunks < _FEWEST_CHUNKS:
        raise RecipeError(
            f"--drop compares the arms between the chunks, from the middle of the training on: --chunks {chunks} "
            f"leaves nothing to save. Take {_FEWEST_CHUNKS} or more, or leave --chunks out ({CHUNKS})."
        )
    return chunks


class Dropping:
    """Stops arms of a comparison by the rule. pauses: the steps after which the runs pause."""

    def __init__(self, team: Team, runs: Schedule, changes: Changes, pauses: Sequence[int]):
        self._team, self._runs, self._changes, self._pauses = team, runs, changes, pauses
        self._race = Race(rounds=len(pauses) + 1, seeds=len(team.seeds), arms=len(team.names), margin=0.0)

    def after_round(self, number: int, orders: Sequence[Order]) -> None:
        """Drop what is surely behind after pause `number` (from 1) of these runs, one an arm, all of one seed."""
        if number < self._race.first:
            return
        now = self._scores(orders, self._pauses[number - 1])
        before = self._scores(orders, self._pauses[number - 2])
        if not now:
            return
        race = dataclasses.replace(self._race, margin=margin_of(self._team.recipe, now))
        for behind in race.behind(number, now, before, (FULL, *self._changes.kept)):
            self._drop(behind, next(order for order in orders if order.job[0] == behind.arm), number, now)

    def _scores(self, orders: Sequence[Order], step: int) -> dict[str, np.ndarray]:
        """The scores of each arm after a step; of those alone that were validated on the first arm's examples."""
        found = {order.job[0]: scores for order in orders if (scores := scores_at(order.folder, step)) is not None}
        ids = next((scores[0] for scores in found.values()), None)
        return {arm: scores for arm, (own, scores) in found.items() if np.array_equal(own, ids)}

    def _drop(self, behind: Behind, order: Order, number: int, now: dict[str, np.ndarray]) -> None:
        recipe, step = self._team.recipe, self._pauses[number - 1]
        metric, sign = recipe.selection_metric, 1
        if (now[behind.leader] <= 0).all():  # a loss, which is followed where the metric has no score of an example
            metric, sign = ("loss", -1) if METRICS[metric].higher_is_better else (metric, -1)
        own, best = (sign * float(np.mean(now[arm])) for arm in (behind.arm, behind.leader))
        reason = f"its validation {METRICS[metric].title} was {own:.3f}, that of {behind.leader} {best:.3f}"
        ended = self._runs.stop(behind.arm, "dropped")
        (_, seed), at, of = ended or (order.job, step, 0)
        self._changes.stop(behind.arm, DROP, seed, at, of, reason)
        say(f"Note: Arm '{behind.arm}' is dropped at step {at:,} of {of:,} of seed {seed}: {reason}.")


def margin_of(recipe: Recipe, scores: dict[str, np.ndarray]) -> float:
    """The margin in units of the scores: the recipe's own for its metric, a point of a share, 1 % of full's loss."""
    full = scores.get("full", next(iter(scores.values())))
    is_loss = bool((full <= 0).all()) and not full.max() == full.min() == 0.0
    metric = recipe.selection_metric
    if is_loss == METRICS[metric].higher_is_better:  # the scores are another metric's: the loss
        return margin_for("loss", float(np.mean(full)))
    if recipe.margin is not None and metric == recipe.metric:
        return recipe.margin
    return margin_for(metric, float(np.mean(full)))


def scores_at(folder: Path, step: int) -> Scores | None:
    """Read a run's validation scores after a step, by id; None where there are none."""
    import pandas

    path = folder / SCORES_FILE
    if not path.is_file():
        return None
    try:
        rows = pandas.read_parquet(path)
    except (OSError, ValueError):  # cut off by a kill: the arm is compared after the next round
        return None
    rows = rows[rows["step"] == step].sort_values("id")
    if not len(rows):
        return None
    return rows["id"].to_numpy(), rows["score"].to_numpy(dtype=float)
