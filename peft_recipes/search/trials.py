"""`Trial`, one short run of a scan; `Trials`, where they are trained: in this process, in several, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from peft_recipes.recipe.recipe import Recipe
from peft_recipes.search.budget import Budget
from peft_recipes.search.candidates import Candidate

FOLDER = ".trials"  # of the scan's folder: what other processes read and write while it runs


@dataclass(frozen=True)
class Trial:
    """One short run: a candidate at a learning rate for so many steps.

    others: the arm's other runs, as scan.json holds them, which decide about an early end. expected: seconds of a
    complete run; with less left of the budget it is not begun.
    """

    candidate: Candidate
    learning_rate: float
    steps: int
    evaluate_after: Sequence[int]
    seed: int
    others: Sequence[dict[str, Any]] = ()
    expected: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.candidate.name} at {self.learning_rate:g}"

    def options(self, seconds: float) -> dict[str, Any]:
        """What another process needs to know, as JSON takes it. seconds: left of the budget."""
        return {
            "arm": self.candidate.name, "learning_rate": self.learning_rate, "seed": self.seed, "steps": self.steps,
            "evaluate_after": list(self.evaluate_after), "others": list(self.others), "seconds": seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Scanned:
    """What trials belong to: the scan's recipe, candidates, folder, seed and budget."""

    recipe: Recipe
    candidates: Sequence[Candidate]
    folder: Path
    seed: int
    budget: Budget


# A trial with its entry of scan.json; None where the budget ended it, or did not let it begin.
Ended = tuple[Trial, dict[str, Any] | None]


class Trials(Protocol):
    """Trains short runs. Used in a `with` block; leaving it by an error or an interruption ends them.

    note: for scan.json, of where they are trained.
    """

    note: str

    def __enter__(self) -> Trials: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...

    def at_a_time(self) -> int:
        """How many are trained at a time."""

    def submit(self, trial: Trial) -> None:
        """Add a trial; it starts as soon as there is room for it."""

    def finished(self) -> Iterator[Ended]:
        """Yield each trial as it ends, until none is left; more may be submitted meanwhile.

        None of them goes on for long after the budget has ended. One that fails has an entry with the reason. Raises
        RecipeError for a mistake in the recipe.
        """


def failed_entry(learning_rate: float, error: str) -> dict[str, Any]:
    """The entry in scan.json of a run that failed."""
    seconds = dict.fromkeys(("load", "step", "evaluate", "first_pass", "total"), 0.0)
    error = " ".join(error.split())[:500]
    return {"learning_rate": learning_rate, "ended": "failed", "error": error, "validation": [], "seconds": seconds}
