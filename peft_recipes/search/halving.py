"""Successive halving: which short run continues, which run of an arm is the best, and an arm's entry in scan.json.

Halving is asynchronous (Li et al. 2018, arXiv:1810.05934): a run is evaluated after a quarter and after half of its
steps, and continues while its validation loss is in the better half of all losses measured at that point so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from peft_recipes.runs.files import finite
from peft_recipes.search.candidates import Candidate, middle_first

if TYPE_CHECKING:
    from peft_recipes.search.short_runs import ShortRun

SHARES = (0.25, 0.5, 1.0)  # of a run's steps: the points at which it is evaluated


def evaluation_steps(steps: int) -> list[int]:
    """The steps after which a run of `steps` steps is evaluated."""
    return [max(math.ceil(share * steps), number) for number, share in enumerate(SHARES, 1)]


def keep_training(run: ShortRun, others: Iterable[dict[str, Any]]) -> bool:
    """Decide after an evaluation whether a run continues. others: the arm's other runs, as scan.json holds them."""
    if not math.isfinite(run.loss):
        return False
    point = len(run.validation) - 1
    losses = [other["validation"][point]["loss"] for other in others if len(other["validation"]) > point]
    losses = sorted([run.loss, *(loss for loss in losses if loss is not None)])
    return run.loss <= losses[max(len(losses) // 2 - 1, 0)]


def pending(candidate: Candidate, runs: Mapping[float, dict[str, Any]]) -> list[float]:
    """The learning rates still to be run: not yet tried, failed, or cut off when an earlier budget ran out."""
    return [
        learning_rate
        for learning_rate in middle_first(candidate.learning_rates)
        if learning_rate not in runs or runs[learning_rate]["ended"] in ("out of time", "failed")
    ]


def run_entry(run: ShortRun) -> dict[str, Any]:
    """A run's entry in scan.json."""
    entry = {
        "learning_rate": run.learning_rate,
        "ended": run.ended,
        "error": run.error or None,
        "validation": run.validation,
        "seconds": {key: round(value, 3) for key, value in run.seconds.items()},
    }
    return finite(entry)


def arm_entry(candidate: Candidate, runs: Mapping[float, dict[str, Any]]) -> dict[str, Any]:
    """An arm's entry in scan.json: its runs and the best of them. runs: the entries by learning rate."""
    best = best_run(runs.values())
    best_rate, tried = best["learning_rate"] if best else None, candidate.learning_rates
    edges = {tried[0]: "lowest", tried[-1]: "highest"} if len(tried) > 1 else {}
    return {
        "of": candidate.of,
        "method": candidate.arm.method_name,
        "rank": candidate.rank,
        "own_learning_rate": candidate.arm.learning_rate,
        "learning_rates": list(tried),
        "best": best_rate,
        "validation": best["validation"][-1] if best else None,
        "at_the_edge": edges.get(best_rate),
        "not_begun": [learning_rate for learning_rate in tried if learning_rate not in runs],
        "runs": [runs[learning_rate] for learning_rate in sorted(runs)],
    }


def best_run(runs: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The lowest validation loss among the runs that were evaluated most often; None if none was evaluated."""
    valid = [
        run
        for run in runs
        if run["ended"] != "diverged" and run["validation"] and run["validation"][-1]["loss"] is not None
    ]
    most = max((len(run["validation"]) for run in valid), default=0)
    furthest = [run for run in valid if len(run["validation"]) == most]
    return min(furthest, key=lambda run: run["validation"][-1]["loss"], default=None)
