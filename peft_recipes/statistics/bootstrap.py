"""What a comparison may claim: the paired difference of an arm and full fine-tuning, its interval, its verdict.

Two things vary when a comparison is repeated: the test examples that happened to be drawn, and the seeds of the runs.
Both arms are tested on the same examples, so these are paired: their difficulty cancels. Seeds share the order of the
data only, and trainings of different parameters drift apart from there; so run effects count as independent between
the arms. That doubles the degrees of freedom (a quantile of 2.8, not 4.3, with three seeds). Effects that do move
together make the interval too wide, which is the safe side.

The model: score[seed, example] = arm + run[seed] + example + noise[seed, example], for both arms. So

    variance of the difference = examples + runs - noise,

where `examples` is the variance, over examples, of the seed-averaged difference, and `runs` that between the means of
the runs; each holds the noise once (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1:386:
resampling both ways counts it twice).

The bootstrap draws examples with replacement and adds run effects drawn with the variance `runs - noise`. Two or three
values are too few to resample (Davison & Hinkley 1997, "Bootstrap Methods and their Application", 2.2: the parametric
way), and a percentile interval of few values is too narrow (Hesterberg 2015, "What teachers should know about the
bootstrap", The American Statistician 69:371). So the spread of n values is corrected by sqrt(n / (n - 1)), and the
interval is stretched by Student's quantile over the normal one, at Satterthwaite's (1946) degrees of freedom.

How often that is right was measured: benchmarks/statistics_calibration.py prints the rates of false claims, and the
power against theory. No rule keeps the rate at 5 % for every size of the run effects when these are seen two or three
times. Where both arms vary with the seed this one keeps 3.5 to 7 % with three seeds or more, and 3 to 8 % with two.
Its power lies between that of the t test on the runs' means, which must learn how much runs vary, and that of the
normal approximation, which knows it: the fewer the seeds, the nearer to the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

Verdict = Literal["equivalent", "better", "worse", "not shown"]

ONE_SEED = (
    "One seed: the interval covers the choice of test examples, not what another seed would change. "
    "No method can tell the two apart from one run; use three seeds or more."
)
TWO_SEEDS = (
    "Two seeds: how much runs differ is barely known. Of equal arms, up to one in twelve may seem to differ instead of "
    "one in twenty, and one in eight where only one of the two varies with the seed. Use three seeds or more."
)

# Calibrated, not derived (benchmarks/statistics_calibration.py): each is a compromise between run effects of no size,
# where the interval is too wide, and of middling size, where it is too narrow.
_SLACK = 0.1  # how far below 0, in shares of `examples`, runs - noise may go: false claims without run effects 3 -> 4 %
_ONSET = 1 / 16  # per degree of freedom: how gently the guessed spread lowers df once it exceeds the noise
_LEAST_DF = {1: 1.0, 2: 1.5}  # by number of arms; binds with two seeds only, where Satterthwaite's guess is very noisy

_CELLS = 1 << 20  # resampled scores held at once (8 MiB)


@dataclass(frozen=True)
class Difference:
    """Arm minus full, in the metric's own unit (accuracy: a fraction), with its bootstrap interval.

    `ci95` is (low, high), at the confidence that was asked for (95 % unless told). `note` says what the interval does
    not cover, where there is something to say.
    """

    estimate: float
    ci95: tuple[float, float]
    seeds: int
    examples: int
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `note` only where there is one."""
        fields: dict[str, Any] = {
            "estimate": self.estimate,
            "ci95": list(self.ci95),
            "seeds": self.seeds,
            "examples": self.examples,
        }
        return fields | ({"note": self.note} if self.note else {})


def paired_difference(
    arm: np.ndarray,
    full: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Difference:
    """Arm minus full, with a bootstrap interval over examples and seeds (how: see the module's docstring).

    `arm`, `full`: [seeds, examples], the score of each example in each run (accuracy: 1 right, 0 wrong; loss: its
    mean loss), column i being the same test example in both. `weights`: [examples], labelled tokens of each; the
    metric of a run is then sum(weights * scores) / sum(weights).

    The same `seed` gives the same interval; swapping the arms mirrors it. With one seed the interval covers the
    choice of test examples alone (`note` says so): runs that differ by their seed then look like differing arms.
    ValueError for scores that are not finite, of other shapes, or of fewer than two examples.
    """
    arm, full = _scores(arm, "arm"), _scores(full, "full")
    if arm.shape != full.shape:
        raise ValueError(
            f"arm has {arm.shape[0]} seeds x {arm.shape[1]} examples, full has {full.shape[0]} x {full.shape[1]}: "
            "compare the same seeds on the same test examples."
        )
    share = _shares(weights, arm.shape[1])
    apart = (arm - full).sum(axis=0) / len(arm)  # summed first: equal 0/1 patterns then give exactly equal floats
    estimate = float((share * apart).mean())
    if np.ptp(arm - full) == 0:  # the same scores in every run: there is nothing that could vary
        interval = (estimate, estimate)
    else:
        bounds = (float(arm.min() - full.max()), float(arm.max() - full.min()))
        interval = _interval(estimate, apart, (arm, full), share, bounds, resamples, seed, confidence)
    return Difference(estimate, interval, *arm.shape, note={1: ONE_SEED, 2: TWO_SEEDS}.get(len(arm)))


def metric_interval(
    values: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """(low, high) of one arm's own metric, the same way as `paired_difference`. `values`: [seeds, examples].

    Its degrees of freedom are half of a difference's, so it is wide with two or three seeds. ValueError as there.
    """
    values = _scores(values, "values")
    share = _shares(weights, values.shape[1])
    average = values.sum(axis=0) / len(values)
    bounds = (float(values.min()), float(values.max()))
    return _interval(float((share * average).mean()), average, (values,), share, bounds, resamples, seed, confidence)


def verdict(difference: Difference, margin: float, higher_is_better: bool) -> Verdict:
    """What the interval allows to say about the arm against full (margin in the metric's own unit, see `margin_for`).

    `equivalent`: the interval lies within [-margin, +margin], even where it excludes zero; `better` or `worse`: it lies
    on one side of zero; else `not shown`. ValueError for a margin that is negative or not finite.
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


def margin_for(metric: str, full_mean: float) -> float:
    """What counts as no difference: one point (0.01) of accuracy, F1, precision or recall; 1 % of full's mean loss.

    ValueError for another metric, or a loss that is not finite.
    """
    if metric.endswith(("accuracy", "f1", "precision", "recall")):
        return 0.01
    if not metric.endswith("loss"):
        raise ValueError(f"No margin is defined for the metric '{metric}': accuracy, f1, precision, recall or loss.")
    if not math.isfinite(full_mean):
        raise ValueError(f"The margin is 1 % of full's mean loss, which is {full_mean}.")
    return 0.01 * abs(full_mean)


def summary(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation with n - 1) of one metric over seeds; the deviation is None for one value."""
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"Expected a list of finite numbers, one a seed, got {values!r}.")
    return float(numbers.mean()), float(numbers.std(ddof=1)) if numbers.size > 1 else None


def _interval(
    estimate: float,
    averaged: np.ndarray,
    arms: tuple[np.ndarray, ...],
    share: np.ndarray,
    bounds: tuple[float, float],
    resamples: int,
    seed: int,
    confidence: float,
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `averaged` [examples]; `arms` ([seeds, examples] each) tell how runs vary."""
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"Need resamples >= 1 and 0 < confidence < 1, not {resamples} and {confidence}.")
    example_scale, run_sd, df = _spread(estimate, averaged, arms, share)
    rng = np.random.default_rng(seed)
    moved = example_scale * (_resampled_means(averaged, share, resamples, rng) - estimate)
    effects = run_sd * rng.standard_normal(resamples)
    # Each effect with both signs: half the sampling noise for nothing, and swapped arms mirror the interval exactly.
    moved = np.concatenate([moved + effects, moved - effects])
    tail = (1 - confidence) / 2
    stretch = _student_quantile(1 - tail, df) / NormalDist().inv_cdf(1 - tail)
    low, high = estimate + stretch * np.quantile(moved, [tail, 1 - tail])
    return float(max(low, bounds[0])), float(min(high, bounds[1]))


def _spread(
    estimate: float, averaged: np.ndarray, arms: tuple[np.ndarray, ...], share: np.ndarray
) -> tuple[float, float, float]:
    """(factor for resampled example means, standard deviation of run effects, degrees of freedom)."""
    seeds, count = arms[0].shape
    narrowness = math.sqrt(count / (count - 1))
    examples = float(np.square(share * (averaged - estimate)).sum()) / (count * (count - 1))
    if seeds == 1:
        return narrowness, 0.0, count - 1.0
    between = [_between_runs(scores, share) for scores in arms]
    runs, noise = (sum(parts) for parts in zip(*between, strict=True))
    freedom = len(arms) * (seeds - 1)
    slack = _SLACK if freedom > 2 else 0.0  # with two degrees of freedom there is nothing to give away
    excess = max(runs - noise, -slack * examples)
    total = examples + excess
    if total == 0:
        return narrowness, 0.0, count - 1.0
    unsure = examples**2 / (count - 1)  # Satterthwaite: the sum of variance^2 / df of what the total is made of
    if excess > 0:
        guessed = sum(part[0] ** 2 for part in between) / (seeds - 1)
        unsure += guessed * (excess / runs) ** min(2.0, _ONSET * freedom)
    df = max(total**2 / unsure, _LEAST_DF[len(arms)])
    shrink = math.sqrt(1 + min(excess, 0.0) / examples) if examples else 1.0
    return narrowness * shrink, math.sqrt(max(excess, 0.0)), df


def _between_runs(scores: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """(variance of the mean over seeds as the runs' means show it, the part of it that is noise of single scores).

    The second from the two-way residuals, with (seeds - 1)(examples - 1) degrees of freedom; `share` enters by the
    linearised ratio estimator (Davison & Hinkley 1997, 2.7.2).
    """
    seeds, count = scores.shape
    means = (share * scores).mean(axis=1)
    residual = share * (scores - means[:, None])
    residual -= residual.mean(axis=0)
    noise = float(np.square(residual).sum()) / ((seeds - 1) * (count - 1))
    return float(means.var(ddof=1)) / seeds, noise / (seeds * count)


def _resampled_means(values: np.ndarray, share: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples] weighted means of `values` drawn with replacement."""
    count = len(values)
    if np.ptp(share) == 0:
        distinct, first, times = np.unique(values, return_index=True, return_counts=True)
        if len(distinct) <= count / 4:  # right/wrong scores: how often each value is drawn is multinomial, exactly
            order = np.argsort(first)  # not by value: swapped arms must see the same draws
            drawn = rng.multinomial(count, times[order] / count, size=resamples)
            return drawn @ distinct[order] / count
    means = np.empty(resamples)
    step = max(1, _CELLS // count)
    products = share * values
    for start in range(0, resamples, step):
        rows = rng.integers(count, size=(min(step, resamples - start), count))
        means[start : start + step] = products[rows].sum(axis=1) / share[rows].sum(axis=1)
    return means


def _student_quantile(probability: float, df: float) -> float:
    """Quantile (above the median) of Student's t for any real df >= 1, without scipy (which it meets within 1e-4).

    With t = sqrt(df) tan(angle) the density becomes cos(angle)^(df - 1): tabulated, summed, read off backwards.
    """
    grid = np.linspace(0.0, min(math.pi / 2, 40 / math.sqrt(df)), 20_001)
    middle = (grid[1:] + grid[:-1]) / 2
    cumulated = np.concatenate([[0.0], np.cumsum(np.cos(middle) ** (df - 1))])
    angle = np.interp((2 * probability - 1) * cumulated[-1], cumulated, grid)
    return float(math.sqrt(df) * math.tan(angle))


def _scores(values: np.ndarray, name: str) -> np.ndarray:
    """`values` as floats [seeds, examples], or ValueError."""
    scores = np.asarray(values, dtype=float)
    if scores.ndim != 2:
        raise ValueError(f"{name} must be an array [seeds, examples], not of shape {scores.shape}.")
    if scores.shape[0] < 1 or scores.shape[1] < 2:
        raise ValueError(
            f"{name} holds {scores.shape[0]} seeds x {scores.shape[1]} examples: an interval needs at least one seed "
            "and two test examples."
        )
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{name} holds {len(bad)} scores that are not finite, the first ({scores[row, column]}) in seed row {row}, "
            f"example {column}: leave failed runs out of the comparison."
        )
    return scores


def _shares(weights: np.ndarray | None, count: int) -> np.ndarray:
    """Weights [examples] scaled to a mean of 1 (all ones for None), or ValueError."""
    if weights is None:
        return np.ones(count)
    given = np.asarray(weights, dtype=float)
    if given.shape != (count,):
        raise ValueError(f"weights must hold one number an example ({count}), not be of shape {given.shape}.")
    if not np.isfinite(given).all() or (given <= 0).any():
        raise ValueError("weights (labelled tokens of each example) must all be finite and above 0.")
    return given / given.mean()
