"""The time budget of a scan: what is left, how long a run takes, and how many steps all runs can afford."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from peft_recipes.search.candidates import Candidate
from peft_recipes.search.halving import SHARES

MIN_STEPS = 3  # one for each evaluation
# After the budget: a share of it, within these seconds, for a run to end its step and to say how it went.
_GRACE_SHARE, _GRACE = 0.05, (2.0, 15.0)
# The share of full runs that halving trains and evaluates, plus a quarter: early runs have few others to lose against.
_STEPS_SHARE, _EVALUATIONS_SHARE = 0.5 * 1.25, 1.75 / 3 * 1.25


class Budget:
    """The seconds of a scan. gone: used before it was created. before: used by earlier calls of the same scan."""

    def __init__(self, seconds: float, gone: float = 0.0):
        self.seconds, self.before, self._started = seconds, 0.0, time.monotonic() - gone

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self._started

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    @property
    def is_overdue(self) -> bool:
        """Whether runs that are still going are ended from outside."""
        return self.left < -min(max(_GRACE_SHARE * self.seconds, _GRACE[0]), _GRACE[1])

    @property
    def deadline(self) -> float:
        """When it is used up, on the clock of time.monotonic."""
        return self._started + self.seconds - self.before


def run_seconds(timings: Mapping[str, float], steps: int) -> float:
    """Seconds of a full run. timings: seconds of "load", "first_pass", one "step" and one "evaluate"."""
    return timings["load"] + timings["first_pass"] + steps * timings["step"] + len(SHARES) * timings["evaluate"]


def affordable_steps(
    candidates: Sequence[Candidate], timings: Mapping[str, Mapping[str, float]], seconds: float, most: int
) -> int:
    """The number of steps per run with which all runs fit into `seconds`; at most `most`.

    timings: of each candidate by name, as `run_seconds` takes them.
    """
    fixed = per_step = 0.0
    for candidate in candidates:
        timing, count = timings[candidate.name], len(candidate.learning_rates)
        evaluations = len(SHARES) * _EVALUATIONS_SHARE * timing["evaluate"]
        fixed += count * (timing["load"] + timing["first_pass"] + evaluations)
        per_step += count * _STEPS_SHARE * timing["step"]
    return max(min(int((seconds - fixed) / per_step) if per_step else most, most), MIN_STEPS)
