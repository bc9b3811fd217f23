"""How many seeds and test examples a verdict takes: the variances of pilot runs, and the power of a comparison.

The model is that of bootstrap.py. With n seeds and m test examples, the difference between an arm and full has

    variance = apart / m + noise / (n m) + runs / n,

`apart`: how much the difference differs by example, in every seed; `noise`: by example and seed; `runs`: by run. They
are estimated from pilot runs of both arms by the same analysis of variance as the interval's.

Power, at a two-sided level of 5 % with Student's t at Satterthwaite's degrees of freedom:
- `equivalent`, of an arm that equals full: both bounds lie within the margin. This is the two one-sided tests procedure
  at 2.5 % (Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15:657), with the power
  2 T(margin / sd - t) - 1 (Julious 2004, "Sample sizes for clinical trials with normal data", Statistics in Medicine
  23:1921, section 5; T is the distribution function of Student's t).
- `different`, of an arm that is better or worse by the margin: the noncentral t.

A few pilot seeds know the variance between runs badly. So each answer comes twice: by the variance that they show, and
by its upper 80 % confidence limit, with which a plan has at least its power four times out of five (Browne 1995, "On
the use of a pilot sample for sample size determination", Statistics in Medicine 14:1933).

Compared with simulated comparisons in tests/statistics/test_sample_size.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from peft_recipes.statistics.bootstrap import between_runs

POWER = 0.8
FEWEST_SEEDS, MOST_SEEDS = 3, 100
MOST_EXAMPLES = 10_000_000
_SAFE = 0.8  # confidence that the variance between runs is not larger

Claim = Literal["equivalent", "different"]


@dataclass(frozen=True)
class Variances:
    """The parts of the variance of a difference, in the metric's unit squared; `seeds`, `examples`: of the pilot.

    right_or_wrong: the scores are 1, 0.5 and 0, so that m examples without a disagreement leave a rate of 3 / m.
    """

    apart: float
    noise: float
    runs: float
    seeds: int
    examples: int
    right_or_wrong: bool = False

    def safe(self) -> Variances:
        """Return them with the upper confidence limit of the variance between runs."""
        freedom, seen = 2 * (self.seeds - 1), self.noise / self.examples  # noise in the means of the runs
        upper = (self.runs + seen) * freedom / stats.chi2.ppf(1 - _SAFE, freedom)
        return replace(self, runs=max(float(upper) - seen, 0.0))

    def power(self, claim: Claim, margin: float, seeds: int, examples: int) -> float:
        """Return the probability of the verdict: of an arm equal to full, or of one that is a margin away."""
        of_examples = self.apart / examples + self.noise / (seeds * examples)
        of_runs = self.runs / seeds
        variance = of_examples + of_runs
        unseen = 3 / examples if self.right_or_wrong else 0.0  # bounds without a disagreement: bootstrap.py
        if variance == 0 or unseen >= margin:
            return float(unseen < margin)
        uncertainty = of_examples**2 / (examples - 1) + of_runs**2 / (2 * (seeds - 1))
        df, shift = max(variance**2 / uncertainty, 1.5), margin / math.sqrt(variance)
        edge = stats.t.ppf(0.975, df)
        if claim == "equivalent":
            return max(float(2 * stats.t.cdf(shift - edge, df) - 1), 0.0)
        return float(stats.nct.sf(edge, df, shift))


def variances(arm: np.ndarray, full: np.ndarray, weights: np.ndarray | None = None) -> Variances:
    """Estimate the variances from pilot runs. `arm`, `full`: [seeds, examples], as for `paired_difference`.

    Raises ValueError for fewer than two seeds or examples.
    """
    seeds, examples = arm.shape
    if seeds < 2 or examples < 2 or arm.shape != full.shape:
        raise ValueError(f"variances need two seeds and two examples of both arms, not {arm.shape} and {full.shape}.")
    share = np.ones(examples) if weights is None else weights / weights.mean()
    averaged = (arm - full).mean(axis=0)
    by_example = float(np.square(share * (averaged - (share * averaged).mean())).sum()) / (examples - 1)
    between = [between_runs(scores, share) for scores in (arm, full)]
    means, noise = (sum(parts) for parts in zip(*between, strict=True))
    return Variances(
        apart=max(by_example - noise * examples, 0.0),
        noise=noise * seeds * examples,
        runs=max(seeds * (means - noise), 0.0),
        seeds=seeds,
        examples=examples,
        right_or_wrong=bool(np.isin(arm, (0.0, 0.5, 1.0)).all() and np.isin(full, (0.0, 0.5, 1.0)).all()),
    )


def seeds_needed(of: Variances, claim: Claim, margin: float, examples: int, power: float = POWER) -> int | None:
    """Return the fewest seeds, of 3 to 100, with this power; None if more would be needed, or none are enough."""
    return _fewest(lambda seeds: of.power(claim, margin, seeds, examples) >= power, FEWEST_SEEDS, MOST_SEEDS)


def examples_needed(of: Variances, claim: Claim, margin: float, seeds: int, power: float = POWER) -> int | None:
    """Return the fewest test examples with this power; None if none are enough with this number of seeds."""
    return _fewest(lambda examples: of.power(claim, margin, seeds, examples) >= power, 10, MOST_EXAMPLES)


def margin_reached(of: Variances, claim: Claim, seeds: int, examples: int, power: float = POWER) -> float:
    """Return the smallest margin, in the metric's unit, at which the verdict has this power."""
    low, high = 0.0, 1e-6
    while of.power(claim, high, seeds, examples) < power:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if of.power(claim, middle, seeds, examples) >= power else (middle, high)
    return high


def _fewest(enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the smallest number from low to high that is enough; what is more than enough is enough as well."""
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
