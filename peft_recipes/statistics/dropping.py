"""Which arms of a comparison are surely behind while they are trained: the rule of `compare --drop`.

A race in the sense of Maron & Moore (1994, "Hoeffding races: accelerating model selection search for classification and
function approximation", NIPS 6:59) and of F-Race (Birattari, Stützle, Paquete & Varrentrapp 2002, "A racing algorithm
for configuring metaheuristics", GECCO): all arms are trained in rounds, and after each round those that are behind the
leader beyond doubt leave. The leader is the arm with the best mean score on the validation split at that step.

An arm leaves if both hold:

1. It is behind now, by more than the margin: the one-sided interval of the paired difference of the validation examples
   lies above the margin. Its level is 5 %, divided by the number of looks and of arms (Bonferroni), so that over all of
   them 5 % of the comparisons at most drop an arm whose difference from the leader is within the margin. One run says
   nothing of how much runs with other seeds differ, so a standard deviation of two margins is added for it.
2. It will not catch up: if it went on improving as fast as in its last round until the end, it would still be behind
   the leader as it is now, by more than the margin. Learning curves that flatten out, as power laws do (Hestness et al.
   2017, "Deep learning scaling is predictable, empirically", arXiv:1712.00409), stay below that line. Its improvement
   is known from the same examples, so the upper end of its interval is taken.

Nothing is dropped in the first half of the steps: an arm that begins to learn late looks like one that never will. What
is saved is the other half, and all further seeds. The test split is not looked at. Measured by simulation with
benchmarks/drop_calibration.py: see docs/concepts/statistics.md, also for the runs for which it does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

RULE = "paired race with projected curves"
ALPHA = 0.05  # wrong drops over all looks and arms of a comparison
EARLIEST = 0.5  # of the steps
FEWEST_EXAMPLES = 30  # for the normal approximation
RUN_SPREAD = 2.0  # margins: the standard deviation of the difference of two runs over their seeds
GAIN_CONFIDENCE = 0.95  # of the improvement in the last round, one-sided


@dataclass(frozen=True)
class Behind:
    """An arm that is surely behind, with figures in units of the score.

    difference: the leader's mean score minus the arm's, now; low: the lower end of its interval. projected: the
    leader's now minus the arm's at the end, if it goes on improving as in its last round (its upper end).
    """

    arm: str
    leader: str
    difference: float
    low: float
    projected: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Race:
    """The rule for one comparison, fixed before its first run.

    rounds: in each run, of equal numbers of steps. margin: the largest difference that counts as none.
    """

    rounds: int
    seeds: int
    arms: int
    margin: float

    @property
    def first(self) -> int:
        """The first round after which an arm may be dropped; one round says nothing of how an arm improves."""
        return max(math.ceil(EARLIEST * self.rounds), 2)

    @property
    def looks(self) -> int:
        """The rounds after which arms may be dropped, in all seeds: not the last, after which a run has ended."""
        return self.seeds * max(self.rounds - self.first, 0)

    @property
    def level(self) -> float:
        """The one-sided significance level of each test."""
        return ALPHA / max(self.looks * (self.arms - 1), 1)

    def behind(
        self,
        number: int,
        now: Mapping[str, np.ndarray],
        before: Mapping[str, np.ndarray],
        keep: Collection[str] = ("full",),
    ) -> list[Behind]:
        """Return the arms that leave after round `number` (from 1) of one seed.

        now: each arm's scores of the validation examples [examples], higher is better, all in one order; before: those
        of the round before. keep: arms that are never dropped. Raises ValueError for arms with other examples.
        """
        if not self.first <= number < self.rounds or len(now) < 2:
            return []
        sizes = {len(scores) for scores in (*now.values(), *before.values())}
        if len(sizes) > 1:
            raise ValueError(f"the arms were validated on {sorted(sizes)} examples; a race needs the same for all")
        if sizes.pop() < FEWEST_EXAMPLES or not all(np.isfinite(scores).all() for scores in now.values()):
            return []
        leader = max(now, key=lambda arm: float(np.mean(now[arm])))
        left = self.rounds - number
        tested = [arm for arm in now if arm != leader and arm not in keep and arm in before]
        made = [self._compared(arm, leader, now, before[arm], left) for arm in tested]
        return [each for each in made if each.low > self.margin and each.projected > self.margin]

    def _compared(self, arm: str, leader: str, now: Mapping[str, np.ndarray], before: np.ndarray, left: int) -> Behind:
        difference, error = _mean_and_error(now[leader] - now[arm])
        reach = stats.t.isf(self.level, len(before) - 1) * math.hypot(error, RUN_SPREAD * self.margin)
        gain, gain_error = _mean_and_error(now[arm] - before)
        most = max(gain + stats.norm.ppf(GAIN_CONFIDENCE) * gain_error, 0.0)
        return Behind(arm, leader, difference, difference - reach, difference - left * most)


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of the values [examples] and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
