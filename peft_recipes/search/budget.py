"""A scan's time: what is left of its budget, what a run takes, and how long runs may be so that all of them fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from peft_recipes.search.candidates import Candidate
from peft_recipes.search.studies import SHARES

LEAST_STEPS = 3  # so that the three looks are at three steps
# What halving costs of running all to their end, with a quarter more for the runs that come before their betters.
_STEPS_SHARE, _LOOKS_SHARE = 0.5 * 1.25, 1.75 / 3 * 1.25


class Budget:
    """The seconds of a scan. gone: those used before it was made. before: those that earlier calls of it used."""

    def __init__(self, seconds: float, gone: float = 0.0):
        self.seconds, self.before, self._started = seconds, 0.0, time.monotonic() - gone

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self._started

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    @property
    def deadline(self) -> float:
        """When it is used up, on the clock of time.monotonic."""
        return self._started + self.seconds - self.before


def run_seconds(figures: Mapping[str, float], steps: int) -> float:
    """Seconds of a whole run of so many steps. figures: what loading, the first pass, a step and an evaluation take."""
    return figures["load"] + figures["first_pass"] + steps * figures["step"] + len(SHARES) * figures["evaluate"]


def affordable_steps(
    chosen: Sequence[Candidate], figures: Mapping[str, Mapping[str, float]], left: float, most: int
) -> int:
    """How many steps each run may have so that all of them fit into what is left; at most `most`.

    figures: of each candidate, as `run_seconds` takes them.
    """
    fixed = steps = 0.0
    for one in chosen:
        took, count = figures[one.name], len(one.rates)
        fixed += count * (took["load"] + took["first_pass"] + len(SHARES) * _LOOKS_SHARE * took["evaluate"])
        steps += count * _STEPS_SHARE * took["step"]
    return max(min(int((left - fixed) / steps) if steps else most, most), LEAST_STEPS)
