"""Seeds until it is decided: intervals that hold at every look, so that looking again does not add false claims.

A comparison that is looked at after every seed, and ended as soon as an interval excludes zero or lies within the
margin, has many chances of a false claim. Here a plan fixes the most seeds N before the first run, and each look gets
an interval of higher confidence: together, all intervals of an arm contain the true difference with 95 %. These are
the repeated confidence intervals of Jennison & Turnbull (1989, "Interim analyses: the repeated confidence interval
approach", Journal of the Royal Statistical Society B 51:305). They hold for any reason to stop: a verdict, the time,
the user. So `equivalent` is as safe as `better` and `worse`.

The confidence of each look comes from an alpha spending function (Lan & DeMets 1983, "Discrete sequential boundaries
for clinical trials", Biometrika 70:659): of the 5 %, the share (n / N)^2 is spent by the look at n seeds (the power
family of Kim & DeMets 1987, "Design and analysis of group sequential tests based on the type I error spending rate
function", Biometrika 74:149). With the power 2 it lies between Pocock's boundary, which decides large differences
early, and O'Brien and Fleming's, which has the most power at the end. The boundaries are those of a Brownian motion
observed at n / N (Armitage, McPherson & Rowe 1969; Jennison & Turnbull 2000, "Group Sequential Methods", chapter 19).

The seeds share their test examples, so the estimates of two looks correlate more than those of a Brownian motion do:
the covariance of two looks is still the variance of the later one, but the information grows by less than n / N. Then
fewer looks are wrong than was allowed for (Slepian's inequality), which is the safe side. The runs' variance is
estimated, so the normal boundary becomes one of Student's t by its significance level, as in bootstrap.py (Jennison &
Turnbull 2000, section 4.4). Measured with benchmarks/sequential_calibration.py: see docs/concepts/statistics.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

ALPHA = 0.05  # false claims over all looks
SPENDING = "alpha (n / N)^2"
FIRST_LOOK = 3  # seeds: with two, the variation between runs is too poorly known (bootstrap.TWO_SEEDS)
_POWER = 2.0
_NODES = 120  # of the quadrature: the levels are then exact to 1e-9
_IN_TAIL = 5  # resamples beyond each end of an interval, at least


@dataclass(frozen=True)
class SequentialPlan:
    """The plan of a comparison until it is decided, fixed before its first run.

    seeds: in the order in which they are run; the plan ends with the last. first: the number of seeds at the first
    look; from then on there is a look after each. comparisons: the number of arms that are compared with full.
    """

    seeds: tuple[int, ...]
    first: int
    comparisons: int

    def confidence(self, seeds: int, comparisons: int = 1) -> float | None:
        """Return the confidence of an interval at a look at this many seeds; None before the first look.

        comparisons: with several, all their intervals hold together over all looks (Bonferroni).
        """
        if seeds < self.first:
            return None
        levels = levels_of(self.first, len(self.seeds), ALPHA / comparisons)
        return round(1 - levels[min(seeds, len(self.seeds)) - self.first], 9)  # a single look: 0.95 exactly

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types, with the confidence of each look."""
        looks = range(self.first, len(self.seeds) + 1)
        return {
            **asdict(self),
            "seeds": list(self.seeds),
            "spending": SPENDING,
            "alpha": ALPHA,
            "confidence": {str(look): self.confidence(look) for look in looks},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SequentialPlan:
        """Read what `to_dict` returned."""
        return cls(tuple(data["seeds"]), data["first"], data["comparisons"])


def plan_seeds(given: Sequence[int], most: int, comparisons: int) -> SequentialPlan:
    """Plan up to `most` seeds: the given ones, then the smallest that are not among them.

    The first look is at all of the given seeds, and at three at least. Raises ValueError where `most` is less.
    """
    if most < FIRST_LOOK:
        raise ValueError(f"the first look is at {FIRST_LOOK} seeds, so the most can't be {most}")
    if most < len(given):
        raise ValueError(f"{len(given)} seeds are given, which are more than the most, {most}")
    unused = (seed for seed in range(most + len(given)) if seed not in given)
    seeds = [*given, *(next(unused) for _ in range(most - len(given)))]
    return SequentialPlan(tuple(seeds), max(FIRST_LOOK, len(given)), comparisons)


def resamples_for(confidence: float) -> int:
    """Return the number of bootstrap resamples that an interval of this confidence needs; 10,000 or more."""
    return max(10_000, math.ceil(_IN_TAIL * 2 / (1 - confidence)))


@functools.lru_cache
def levels_of(first: int, most: int, alpha: float = ALPHA) -> tuple[float, ...]:
    """Return the two-sided significance level of each look, at first, first + 1, ..., most seeds.

    Over all looks, a Brownian motion is beyond the boundaries of these levels with probability `alpha`.
    """
    times = np.arange(first, most + 1) / most
    return tuple(float(2 * stats.norm.sf(bound)) for bound in _boundaries(times, alpha * times**_POWER))


def _boundaries(times: np.ndarray, spent: np.ndarray) -> list[float]:
    """Return z[look] such that |B(t)| / sqrt(t) first exceeds z at looks 1 to k with probability spent[k].

    B: a Brownian motion. Its density within the boundaries is carried from look to look by Gauss-Legendre quadrature.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    values, masses, bounds = np.zeros(1), np.ones(1), []
    for time, scale, share in zip(times, np.sqrt(np.diff(times, prepend=0)), np.diff(spent, prepend=0), strict=True):
        far = 40 * math.sqrt(time)
        bound = optimize.brentq(_share_beyond, 0.0, far, args=(values, masses, scale, share), xtol=1e-12)
        within = bound * nodes
        densities = stats.norm.pdf((within[:, None] - values) / scale) / scale
        values, masses = within, bound * weights * (densities @ masses)
        bounds.append(bound / math.sqrt(time))
    return bounds


def _share_beyond(bound: float, values: np.ndarray, masses: np.ndarray, scale: float, share: float) -> float:
    """Return the probability of a step from `values` [nodes], with `masses`, to beyond +-bound; less `share`."""
    outside = stats.norm.sf((bound - values) / scale) + stats.norm.cdf((-bound - values) / scale)
    return float(masses @ outside) - share
