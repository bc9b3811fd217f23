"""Paired bootstrap: the difference between an arm and full fine-tuning, its interval and its verdict.

Both arms are tested on the same examples, so scores are paired and the difficulty of an example cancels. Seeds fix
only the order of the data, and trainings of different parameters drift apart, so run effects count as independent
between the arms. This doubles the degrees of freedom; where run effects are correlated after all, the interval is too
wide, which is the safe side. Model, for both arms: score[seed, example] = arm + run[seed] + example + noise. Hence

    variance of the difference = examples + runs - noise,

where `examples` is the variance of the seed-averaged difference over examples, and `runs` the variance between the
means of the runs. Each contains the noise once (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics
1:386: resampling both ways counts it twice).

The bootstrap resamples examples with replacement and adds normal run effects of variance `runs - noise`: two or three
runs are too few to resample (Davison & Hinkley 1997, "Bootstrap Methods and their Application", 2.2: the parametric
bootstrap). A percentile interval of few values is too narrow (Hesterberg 2015, "What teachers should know about the
bootstrap", The American Statistician 69:371). So the spread of n values is multiplied by sqrt(n / (n - 1)), and the
interval by the ratio of Student's quantile to the normal one, at Satterthwaite's (1946) degrees of freedom.

Right and wrong answers can't exclude what was not drawn: n examples without a disagreement are likely enough with a
rate of 3/n (Hanley & Lippman-Hand 1983, "If nothing goes wrong, is everything all right?"). Resampling them gives an
interval without width. So each direction gets one unseen disagreement, as the upper limit of Clopper & Pearson (1934)
counts one event more than were seen: the rate of x events has the quantiles of Gamma(x + 1), and the one more is an
exponential variable. Without a disagreement the interval is then [-3/n, 3/n]; with many, the addition is
small. It is smaller, too, where a disagreement in one seed is seen not to be one in the others.

Of several arms, each has its own interval; `simultaneous` is the confidence at which all hold together (Bonferroni;
Dunn 1961, "Multiple comparisons among means"). The t statistics of arms compared with one reference correlate at about
0.5, for which Dunnett's (1955) exact limits are at most 3 % closer; Bonferroni's also hold for arms with other seeds.

Measured with benchmarks/statistics_calibration.py: where both arms vary with the seed, 3 to 7 % of the intervals of
equal arms exclude zero with three seeds or more, and 3 to 9 % with two. The power is between that of the t test on run
means, which must estimate the variance between runs, and the z test, which knows it. See docs/concepts/statistics.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import special

Verdict = Literal["equivalent", "better", "worse", "not shown"]

ONE_SEED = (
    "One seed: the interval covers the choice of test examples, not the variation between seeds. "
    "One run can't separate the two; use three seeds or more."
)
TWO_SEEDS = (
    "Two seeds: the variation between runs is poorly known. Up to one in eleven equal arms may seem to differ instead "
    "of one in twenty, and one in eight where only one of the two arms varies with the seed. Use three seeds or more."
)

_FEW_SEEDS = {1: ONE_SEED, 2: TWO_SEEDS}

# Calibrated, not derived (benchmarks/statistics_calibration.py). Each is a compromise between no run effects, where
# the interval is too wide, and medium ones, where it is too narrow.
_SLACK = 0.1  # lower bound of runs - noise, as a share of `examples`: false claims without run effects 3 -> 4 %
_ONSET = 1 / 16  # per degree of freedom: how gradually the estimated run variance lowers df once it exceeds the noise
_LEAST_DF = {1: 1.0, 2: 1.5}  # by number of arms; matters with two seeds, where Satterthwaite's estimate is very noisy

_CHUNK = 1 << 20  # resampled scores in memory at once (8 MiB)


@dataclass(frozen=True)
class Difference:
    """Arm minus full in the metric's unit (accuracy: a fraction), with its bootstrap interval.

    `ci95` is (low, high) at the requested confidence, 95 % by default. `note` says what the interval does not cover.
    """

    estimate: float
    ci95: tuple[float, float]
    seeds: int
    examples: int
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, without an empty `note`."""
        fields = asdict(self) | {"ci95": list(self.ci95)}
        return {key: value for key, value in fields.items() if value is not None}


def paired_difference(
    arm: np.ndarray,
    full: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    share: bool = False,
) -> Difference:
    """Compute arm minus full with a bootstrap interval over examples and seeds (method: see the module's docstring).

    `arm`, `full`: [seeds, examples], the score of each example in each run (accuracy: 1 right, 0 wrong; loss: its
    mean loss). Column i is the same test example in both. `weights`: [examples], the labelled tokens of each example;
    the metric of a run is then sum(weights * scores) / sum(weights). `share`: the metric lies between 0 and 1 though a
    score may be any number (an F1 of words, pseudo-values); scores of 0, 0.5 and 1 alone are taken as such anyway.

    The same `seed` gives the same interval; swapping the arms mirrors it. With one seed the interval covers only the
    choice of test examples (`note` says so), so two seeds of one arm can look like different arms. Raises ValueError
    for scores that are not finite, differ in shape, or cover fewer than two examples.
    """
    arm, full = _scores(arm, "arm"), _scores(full, "full")
    if arm.shape != full.shape:
        raise ValueError(
            f"arm has {arm.shape[0]} seeds x {arm.shape[1]} examples, full has {full.shape[0]} x {full.shape[1]}: "
            "compare the same seeds on the same test examples."
        )
    shares = _shares(weights, arm.shape[1])
    averaged = (arm - full).sum(axis=0) / len(arm)  # sum before dividing: equal 0/1 patterns give exactly equal floats
    estimate = float((shares * averaged).mean())
    options = {"resamples": resamples, "seed": seed, "confidence": confidence, "bounded": share}
    interval = _interval(averaged, (arm, full), shares, **options)
    return Difference(estimate, interval, *arm.shape, note=_FEW_SEEDS.get(len(arm)))


def metric_interval(
    values: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    share: bool = False,
) -> tuple[float, float]:
    """Compute the interval (low, high) of one arm's metric as in `paired_difference`. `values`: [seeds, examples].

    It has half the degrees of freedom of a difference, so it is wide with two or three seeds. Raises ValueError for
    the same reasons.
    """
    values = _scores(values, "values")
    shares = _shares(weights, values.shape[1])
    averaged = values.sum(axis=0) / len(values)
    options = {"resamples": resamples, "seed": seed, "confidence": confidence, "bounded": share}
    return _interval(averaged, (values,), shares, **options)


def difference_from(
    values: np.ndarray, fixed: float, *, confidence: float = 0.95, resamples: int = 10_000
) -> Difference:
    """Compute an arm's metric minus a fixed value, with the interval of `metric_interval`. `values`: [seeds, examples].

    For a win rate against full: full's own is 0.5 by definition and does not vary, so as one of two arms it would only
    count degrees of freedom that are not there. Raises ValueError as `metric_interval`.
    """
    values = _scores(values, "values")
    interval = metric_interval(values, confidence=confidence, resamples=resamples, share=True)
    low, high = (bound - fixed for bound in interval)
    return Difference(float(values.mean()) - fixed, (low, high), *values.shape, note=_FEW_SEEDS.get(len(values)))


def simultaneous(comparisons: int, confidence: float = 0.95) -> float:
    """Return the confidence of each of several intervals that all hold together with `confidence` (Bonferroni)."""
    return 1 - (1 - confidence) / comparisons


def verdict(difference: Difference, margin: float, higher_is_better: bool) -> Verdict:
    """Return the verdict on the arm that the interval supports. `margin`: in the metric's unit, see
    recipe.metrics.margin_for.

    `equivalent`: the interval is within [-margin, +margin], even where it excludes zero. `better` or `worse`: it is on
    one side of zero. Otherwise `not shown`. Raises ValueError for a margin that is negative or not finite.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"The margin must be a finite number of at least 0, not {margin}.")
    low, high = difference.ci95
    if -margin <= low and high <= margin:
        return "equivalent"
    if low > 0:
        return "better" if higher_is_better else "worse"
    if high < 0:
        return "worse" if higher_is_better else "better"
    return "not shown"


def _interval(
    averaged: np.ndarray,
    arms: tuple[np.ndarray, ...],
    share: np.ndarray,
    *,
    resamples: int,
    seed: int,
    confidence: float,
    bounded: bool,
) -> tuple[float, float]:
    """Bootstrap the interval of the mean of `averaged` [examples], with the run effects of `arms` [seeds, examples]."""
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"Need resamples >= 1 and 0 < confidence < 1, not {resamples} and {confidence}.")
    estimate = float((share * averaged).mean())
    tail = (1 - confidence) / 2
    rng = np.random.default_rng(seed)
    spread = np.ptp(arms[0] - (arms[1] if len(arms) > 1 else 0))
    if spread <= 1e-12 * np.abs(arms).max():  # the same for every example in every run
        deviations = np.zeros(resamples)
    else:
        example_scale, run_sd, df = _spread(estimate, averaged, arms, share, far=confidence > 0.95)
        means = example_scale * (_resampled_means(averaged, share, resamples, rng) - estimate)
        effects = run_sd * rng.standard_normal(resamples)
        stretch = special.stdtrit(df, 1 - tail) / special.ndtri(1 - tail)  # quantiles of t and of the normal
        # Antithetic: each effect with both signs halves the sampling noise, and swapped arms mirror the interval.
        deviations = stretch * np.concatenate([means + effects, means - effects])
    least, most = _range(arms, bounded)
    if math.isfinite(most):
        unseen = _unseen_size(averaged, share) / averaged.size * _laplace(resamples, rng)
        unseen = np.tile(unseen, len(deviations) // resamples)  # the same beside either sign of an effect
        deviations = np.concatenate([deviations + unseen, deviations - unseen])
    low, high = estimate - np.quantile(-deviations, 1 - tail), estimate + np.quantile(deviations, 1 - tail)
    # A difference of correlations may exceed 1: the limits never leave out the estimate itself.
    return float(max(low, min(least, estimate))), float(min(high, max(most, estimate)))


def _range(arms: tuple[np.ndarray, ...], bounded: bool) -> tuple[float, float]:
    """Return the limits of the metric or difference: those of a share, of right (1), tied (0.5), wrong (0), or none."""
    bounded = bounded or all(np.isin(scores, (0.0, 0.5, 1.0)).all() for scores in arms)
    limits = (0.0, 1.0) if bounded else (-math.inf, math.inf)
    if len(arms) > 1:
        return -limits[1], limits[1]
    return (0.0 if arms[0].min() >= 0 else limits[0]), limits[1]


def _unseen_size(averaged: np.ndarray, share: np.ndarray) -> float:
    """Return how much one unseen disagreement counts: 1 as long as none is seen, 1 / seeds if each is in one seed only.

    It is the mean square of the disagreements divided by their mean, with one of size 1 added to what was seen.
    """
    rest = round(float(averaged.mean())) if averaged.min() >= 0 else 0  # of one arm's scores: wrong of mostly right
    sizes = np.abs(averaged - rest)
    return float((np.square(share * sizes).sum() + np.square(share).mean()) / ((share * sizes).sum() + 1))


def _laplace(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a stratified sample of the difference of two exponential variables, in random order."""
    drawn = (rng.permutation(count) + 0.5) / count
    return np.where(drawn > 0.5, -np.log(2 * (1 - drawn)), np.log(2 * drawn))


def _spread(
    estimate: float, averaged: np.ndarray, arms: tuple[np.ndarray, ...], share: np.ndarray, far: bool
) -> tuple[float, float, float]:
    """Return (factor for resampled example means, standard deviation of run effects, degrees of freedom).

    far: for the tails beyond 95 %, where a run variance that was estimated too small by chance weighs more. There the
    compromises below don't hold, and all of the uncertainty about the run variance counts.
    """
    seeds, count = arms[0].shape
    correction = math.sqrt(count / (count - 1))
    examples = float(np.square(share * (averaged - estimate)).sum()) / (count * (count - 1))
    if seeds == 1:
        return correction, 0.0, count - 1.0
    between = [between_runs(scores, share) for scores in arms]
    runs, noise = (sum(parts) for parts in zip(*between, strict=True))
    freedom = len(arms) * (seeds - 1)
    slack = _SLACK if freedom > 2 and not far else 0.0  # two degrees of freedom leave no slack
    excess = max(runs - noise, -slack * examples)
    total = examples + excess
    if total == 0:
        return correction, 0.0, count - 1.0
    uncertainty = examples**2 / (count - 1)  # Satterthwaite: sum of variance^2 / df over the parts of the total
    if far or excess > 0:
        estimated = sum(part[0] ** 2 for part in between) / (seeds - 1)
        uncertainty += estimated * (1.0 if far else (excess / runs) ** min(2.0, _ONSET * freedom))
    df = max(total**2 / uncertainty, _LEAST_DF[len(arms)])
    shrink = math.sqrt(1 + min(excess, 0.0) / examples) if examples else 1.0
    return correction * shrink, math.sqrt(max(excess, 0.0)), df


def between_runs(scores: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """Return the variance of the mean over seeds, estimated from the run means, and the part of it that is noise.

    The noise comes from the two-way residuals, with (seeds - 1)(examples - 1) degrees of freedom. `share` enters
    through the linearised ratio estimator (Davison & Hinkley 1997, 2.7.2).
    """
    seeds, count = scores.shape
    means = (share * scores).mean(axis=1)
    residual = share * (scores - means[:, None])
    residual -= residual.mean(axis=0)
    noise = float(np.square(residual).sum()) / ((seeds - 1) * (count - 1))
    return float(means.var(ddof=1)) / seeds, noise / (seeds * count)


def _resampled_means(values: np.ndarray, share: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return [resamples] weighted means of `values` drawn with replacement."""
    count = len(values)
    if np.ptp(share) == 0:
        distinct, first, counts = np.unique(values, return_index=True, return_counts=True)
        if len(distinct) <= count / 4:  # right/wrong scores: the counts of the drawn values are exactly multinomial
            order = np.argsort(first)  # not by value: swapped arms must see the same draws
            drawn = rng.multinomial(count, counts[order] / count, size=resamples)
            return drawn @ distinct[order] / count
    means = np.empty(resamples)
    step = max(1, _CHUNK // count)
    weighted = share * values
    for start in range(0, resamples, step):
        indices = rng.integers(count, size=(min(step, resamples - start), count))
        means[start : start + step] = weighted[indices].sum(axis=1) / share[indices].sum(axis=1)
    return means


def _scores(values: np.ndarray, name: str) -> np.ndarray:
    """Return `values` as floats [seeds, examples]. Raises ValueError for a wrong shape or non-finite scores."""
    scores = np.asarray(values, dtype=float)
    if scores.ndim != 2:
        raise ValueError(f"{name} must be an array [seeds, examples], not of shape {scores.shape}.")
    if scores.shape[0] < 1 or scores.shape[1] < 2:
        raise ValueError(
            f"{name} has {scores.shape[0]} seeds x {scores.shape[1]} examples: an interval needs at least one seed "
            "and two test examples."
        )
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{name} has {len(bad)} scores that are not finite, the first ({scores[row, column]}) in seed row {row}, "
            f"example {column}: leave failed runs out of the comparison."
        )
    return scores


def _shares(weights: np.ndarray | None, count: int) -> np.ndarray:
    """Return weights [examples] scaled to a mean of 1; all ones for None. Raises ValueError for invalid weights."""
    if weights is None:
        return np.ones(count)
    given = np.asarray(weights, dtype=float)
    if given.shape != (count,):
        raise ValueError(f"weights must have one number per example ({count}), not the shape {given.shape}.")
    if not np.isfinite(given).all() or (given <= 0).any():
        raise ValueError("weights (labelled tokens of each example) must all be finite and above 0.")
    return given / given.mean()
