"""Simulated false drops of `compare --drop`, and the training that it saves, for several kinds of learning curves.

    python benchmarks/drop_calibration.py --keep                # the kept table, two to three minutes on one thread
    python benchmarks/drop_calibration.py --comparisons 50      # a quick look

Each row simulates comparisons: every arm has a learning curve of the row's kind, every run its own deviation from it
(`run_sd`, in margins, and half a margin from round to round), and every validation example a score that the runs share
in part. Arms take turns in 8 rounds; after each, the rule of statistics/dropping.py drops arms. Nothing protects full.

Kinds of curves, from the first step to the last (quality of the best arms in the end: 0.6 to 0.95, of the others up to
20 points less; of losses up to 20 % more):
- `power`: power laws with random ends, exponents and scales.
- `crossing`: power laws of which those that end higher are slower.
- `late`: power laws, and half of the arms begin to learn after up to 40 % of the steps.
- `declining`: power laws, and half of the arms get worse again, by up to 5 points or 5 %, from some step on.
- `kept`: the validation curves of adapters/mnist-shift and adapters/smollm2-*, as they were measured, drawn at random
  from one of them, each moved up or down (standard deviation: 2 margins).

A drop is false if the arm is within the margin (1 point; 1 % of the loss) of the best one in the end, by the curves
themselves. `false`: share of comparisons with at least one; `best`: in which the best arm itself is dropped. `saved`:
share of all training steps. `dropped`: of the arms that end more than the margin below the best, the share that is
dropped. `naive`: the same by a t test at 5 % after every round, and `halving` by leaving the better half of the arms
after a quarter and after half of the steps of the first seed (successive halving).
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from harness import result_parser, write_result
from scipy import stats
from statistics_calibration import one_row_a_line

from peft_recipes.statistics.dropping import ALPHA, EARLIEST, GAIN_CONFIDENCE, RUN_SPREAD, Race

ROUNDS = 8
MARGIN = 0.01
WIGGLE = 0.5  # margins, from round to round of one run
SPREADS = {
    "example": 1.0,
    "run": 0.6,
    "round": 0.3,
}  # of a latent score: of all runs, of one run, of one round
LOSS_SD = 0.7  # of the logarithm of the examples' losses
KEPT = Path(__file__).parents[1] / "adapters"
Rng = np.random.Generator
Curves = np.ndarray  # [arms, rounds]: the quality after each round, higher is better; of a loss minus the loss


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    metric: str
    kind: str
    arms: int
    seeds: int
    examples: int
    run_sd: float


def power_laws(arms: int, rng: Rng, crossing: bool = False, late: bool = False) -> np.ndarray:
    """How far each arm is from its end, after each round: 1 at the start [arms, rounds]."""
    exponents, scales = rng.uniform(0.3, 2.0, arms), np.exp(rng.uniform(np.log(0.02), np.log(1.0), arms))
    if crossing:  # the later an arm is in the order, the lower it ends, and the faster it is
        scales = np.sort(scales)[::-1]
        exponents = np.sort(exponents)
    begin = rng.uniform(0, 0.4, arms) * (rng.random(arms) < 0.5) if late else np.zeros(arms)
    times = np.clip(np.arange(1, ROUNDS + 1)[None] / ROUNDS - begin[:, None], 0, None)
    return (1 + times / scales[:, None]) ** -exponents[:, None]


def ends(metric: str, arms: int, rng: Rng) -> np.ndarray:
    """What each arm would reach in the end, the best first [arms]; several are close to the best."""
    worse = np.sort(np.where(rng.random(arms) < 0.4, rng.uniform(0, 0.02, arms), rng.uniform(0, 0.2, arms)))
    return rng.uniform(0.6, 0.95) - worse if metric == "accuracy" else -(1 + worse)


def made_up(kind: str, metric: str, arms: int, rng: Rng) -> Curves:
    reached = ends(metric, arms, rng)
    start = rng.uniform(0.1, 0.5) if metric == "accuracy" else -rng.uniform(1.5, 3.0)
    away = power_laws(arms, rng, crossing=kind == "crossing", late=kind == "late")
    curves = reached[:, None] - (reached - start)[:, None] * away
    if kind == "declining":
        begins, much = rng.uniform(0, 0.8, arms), rng.uniform(0, 0.05, arms) * (rng.random(arms) < 0.5)
        times = np.arange(1, ROUNDS + 1)[None] / ROUNDS
        curves -= much[:, None] * np.clip(times - begins[:, None], 0, None) / (1 - begins[:, None])
    return curves


def kept_curves(metric: str) -> list[list[np.ndarray]]:
    """The measured validation curves of each kept comparison, one a run, at the ends of `ROUNDS` equal parts.

    Before its first measured point a curve is continued by the line through the first two.
    """
    found = []
    for path in sorted(KEPT.glob("*/comparison.json")):
        comparison = json.loads(path.read_text(encoding="utf-8"))
        loss = comparison["metric"] != "accuracy"  # of language models the loss is followed
        if loss != (metric == "loss"):
            continue
        curves = []
        for arm in comparison["arms"].values():
            for curve in arm["curves"]:
                steps, values = np.array([point for point in curve["validation"] if point[1] is not None]).T
                at = np.arange(1, ROUNDS + 1) / ROUNDS * steps[-1]
                early = values[0] + (at - steps[0]) * (values[1] - values[0]) / (steps[1] - steps[0])
                curve_at = np.where(at < steps[0], early, np.interp(at, steps, values))
                curves.append(-curve_at if loss else curve_at)
        least = min(np.abs(curve).min() for curve in curves)
        found.append([curve / least if loss else curve for curve in curves])
    return found


def curves_of(row: Row, rng: Rng, kept: list[list[np.ndarray]]) -> Curves:
    if row.kind != "kept":
        return made_up(row.kind, row.metric, row.arms, rng)
    curves = kept[rng.integers(len(kept))]
    chosen = np.stack([curves[index] for index in rng.integers(len(curves), size=row.arms)])
    return chosen + 2 * MARGIN * rng.standard_normal((row.arms, 1))  # other arms than those that were measured


def scores_of(row: Row, curves: Curves, rng: Rng) -> np.ndarray:
    """Scores of the examples in one seed [arms, rounds, examples]."""
    sd = MARGIN * (1 if row.metric == "accuracy" else np.abs(curves).min())
    means = curves + sd * row.run_sd * rng.standard_normal((row.arms, 1))
    means = means + sd * WIGGLE * rng.standard_normal(curves.shape)
    latent = (
        SPREADS["example"] * rng.standard_normal(row.examples)
        + SPREADS["run"] * rng.standard_normal((row.arms, 1, row.examples))
        + SPREADS["round"] * rng.standard_normal((row.arms, ROUNDS, row.examples))
    ) / np.sqrt(sum(spread**2 for spread in SPREADS.values()))
    if row.metric == "accuracy":
        return (stats.norm.ppf(np.clip(means, 0.001, 0.999))[..., None] + latent > 0).astype(float)
    return means[..., None] * np.exp(LOSS_SD * latent - LOSS_SD**2 / 2)


Drops = Callable[[int, int, dict[int, np.ndarray], dict[int, np.ndarray]], list[int]]


def run_race(all_scores: list[np.ndarray], drops: Drops) -> tuple[set[int], int]:
    """The arms that are dropped, and the number of rounds that are trained. drops: of a seed's number and a round's."""
    active, trained = list(range(len(all_scores[0]))), 0
    dropped: set[int] = set()
    for seed, scores in enumerate(all_scores):
        for number in range(1, ROUNDS + 1):
            trained += len(active)
            now = {arm: scores[arm, number - 1] for arm in active}
            before = {arm: scores[arm, number - 2] for arm in active} if number > 1 else {}
            dropped |= set(drops(seed, number, now, before))
            active = [arm for arm in active if arm not in dropped]
    return dropped, trained


def by_race(race: Race) -> Drops:
    return lambda seed, number, now, before: [each.arm for each in race.behind(number, now, before, keep=())]


def naive(race: Race) -> Drops:
    """A t test at 5 % after every round, of the difference from the leader alone."""

    def drops(seed: int, number: int, now: dict[int, np.ndarray], before: dict[int, np.ndarray]) -> list[int]:
        leader = max(now, key=lambda arm: now[arm].mean())
        if not race.first <= number < ROUNDS:
            return []
        found = []
        for arm in now:
            away = now[leader] - now[arm]
            error = away.std(ddof=1) / np.sqrt(len(away))
            if arm != leader and away.mean() > 1.645 * error:
                found.append(arm)
        return found

    return drops


def halving(seed: int, number: int, now: dict[int, np.ndarray], before: dict[int, np.ndarray]) -> list[int]:
    """Successive halving: the worse half after a quarter and after half of the steps of the first seed."""
    if seed or number not in (ROUNDS // 4, ROUNDS // 2) or len(now) < 2:
        return []
    return sorted(now, key=lambda arm: now[arm].mean())[: len(now) // 2]


def simulate(row: Row, comparisons: int, seed: int) -> dict[str, Any]:
    names = ("power", "crossing", "late", "declining", "kept")
    rng = np.random.default_rng([seed, names.index(row.kind), row.arms, row.seeds, row.examples, int(10 * row.run_sd),
                                 row.metric == "loss"])  # fmt: skip
    kept = kept_curves(row.metric) if row.kind == "kept" else []
    found: dict[str, list[float]] = {key: [] for key in ("false", "best", "saved", "dropped", "naive", "halving")}
    for _ in range(comparisons):
        curves = curves_of(row, rng, kept)
        margin = MARGIN * (1 if row.metric == "accuracy" else np.abs(curves[:, -1]).min())
        race = Race(ROUNDS, row.seeds, row.arms, margin)
        scores = [scores_of(row, curves, rng) for _ in range(row.seeds)]
        end = curves[:, -1]
        near = set(np.flatnonzero(end >= end.max() - margin).tolist())
        dropped, trained = run_race(scores, by_race(race))
        found["false"].append(bool(dropped & near))
        found["best"].append(int(end.argmax()) in dropped)
        found["saved"].append(1 - trained / (row.arms * row.seeds * ROUNDS))
        if others := set(range(row.arms)) - near:
            found["dropped"].append(len(dropped & others) / len(others))
        for name, rule in (("naive", naive(race)), ("halving", halving)):
            found[name].append(bool(run_race(scores, rule)[0] & near))
    return {key: round(float(np.mean(values)), 4) for key, values in found.items()}


def rows() -> Iterator[Row]:
    for kind in ("power", "crossing", "late", "declining", "kept"):
        for metric in ("accuracy", "loss"):
            for examples in (100, 300, 1_000):
                yield Row(metric, kind, 8, 3, examples, 1.0)
    for kind in ("power", "crossing"):
        for run_sd in (0.0, 2.0, 3.0):
            yield Row("accuracy", kind, 8, 3, 1_000, run_sd)
        for arms, seeds in ((4, 1), (12, 3)):
            yield Row("accuracy", kind, arms, seeds, 300, 1.0)


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--comparisons", type=int, default=400, help="simulated comparisons per row")
    parser.add_argument("--seed", type=int, default=1, help="seed of the simulation")
    parser.add_argument("--tiny", action="store_true", help="a row of each kind with few comparisons, for a test")
    options = parser.parse_args()
    comparisons, todo = (5, list(rows())[::6]) if options.tiny else (options.comparisons, list(rows()))
    head = {
        "comparisons": comparisons,
        "rounds": ROUNDS,
        "alpha": ALPHA,
        "earliest": EARLIEST,
        "gain_confidence": GAIN_CONFIDENCE,
        "run_spread": RUN_SPREAD,
        "seed": options.seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
    }
    table = []
    for row in todo:
        table.append(asdict(row) | simulate(row, comparisons, options.seed))
        print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    text = one_row_a_line(head, {"rows": table})
    write_result(options, Path(__file__).with_suffix(".json"), {**head, "rows": table}, text=text)


if __name__ == "__main__":
    main()
