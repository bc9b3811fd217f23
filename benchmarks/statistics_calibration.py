"""Simulated false-positive rate and power of the intervals of a comparison.

    python benchmarks/statistics_calibration.py                     # the table
    python benchmarks/statistics_calibration.py --comparisons 200   # a quick look

Each row simulates comparisons of two arms on fresh test examples with fresh runs, and counts those whose 95 % interval
excludes zero. Without a difference that is a false claim and should happen in 5 % (3 to 7 % is kept where it can be).
With a difference of 3 points (or 1.5 % of the loss) it is the power, next to two theoretical values from the true
variances: `z`, the normal approximation, a test that knows the variances, which none can beat; and `t`, the noncentral
t of the textbook test on the runs' means, which estimates the variance from them, with 2 x (seeds - 1) degrees of
freedom.

Accuracy: an example's chance of being right comes from its difficulty (logit normal 1.5 +- 1.5, mean accuracy 0.746); a
run effect moves every chance so that the mean moves by a normal number of points; right or wrong is then a coin flip.
Loss: a skewed difficulty, a normal run effect in percent of the mean loss, skewed noise, labelled tokens as weights.
`apart`: arms that also differ by example. `one arm`: only one arm varies with the seed. `together`: run effects of the
two arms with one seed correlate at 0.5. `opposed`: at -0.5. The last two break the assumption of independent runs.
`own`: the interval of one arm's own metric, and how often it misses the true value.

The second table has the false verdicts of one comparison by accuracy (margin 1 point) or loss at 8 to 1,000 examples.
`equal` is the case above with a run effect of 1 (none with one seed), `together` and `opposed` likewise; a false
verdict is `better` or `worse`. `rare`: equal arms that disagree on 1 % of the examples. `edge` and `beyond`: full is
always right and the arm wrong on 1 % (the margin) or 2 % of the examples, so that `equivalent` and `better` are false.
`lasting`: an arm is wrong on the same examples with every seed, which is the hardest case; else on others.

The third has several arms compared with one full, and the share of comparisons with at least one false verdict: by each
arm's own interval, and by the intervals that hold together.

Simulated comparisons use 500 resamples (1,000 for several arms), not 10,000, to save time; the procedure is the same.
Prints the tables and the result as JSON; --keep writes benchmarks/statistics_calibration.json.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from harness import result_parser, write_result
from scipy import stats

from peft_recipes.statistics.bootstrap import Verdict, metric_interval, paired_difference, simultaneous, verdict

RESAMPLES = 500
EXAMPLES, SEEDS, ARMS = (8, 20, 40, 60, 100, 300, 1_000), (1, 2, 3, 5), (2, 3, 5, 8, 12)
MARGIN = 0.01
TRUE_MEAN = {"accuracy": 0.74575, "loss": 1.0}  # the first by simulation, within 0.0001


@dataclass(frozen=True)
class Case:
    """One row: `run_sd` in points of accuracy or percent of the loss, `gap` the true difference in the same."""

    metric: str
    kind: str
    seeds: int
    examples: int
    run_sd: float
    gap: float = 0.0


def run_effects(case: Case, rng: np.random.Generator) -> np.ndarray:
    """[2, seeds] effects of the runs of arm and full, as fractions."""
    effects = rng.standard_normal((2, case.seeds))
    correlation = {"together": 0.5, "opposed": -0.5}.get(case.kind, 0.0)
    effects[0] = correlation * effects[1] + np.sqrt(1 - correlation**2) * effects[0]
    if case.kind == "one arm":
        effects[0] = 0.0
    return case.run_sd / 100 * effects


def chances(case: Case, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """([2, count] chance of being right under arm and full, [count] how much an effect of 1 moves it)."""
    chance = 1 / (1 + np.exp(-rng.normal(1.5, 1.5, count)))
    moves = chance * (1 - chance) / 0.1398  # the mean of p(1 - p) over these difficulties, so that it is 1 on average
    by_arm = np.stack([chance + case.gap / 100 * moves, chance])
    if case.kind == "apart":
        by_arm += 0.1 * moves * rng.uniform(-1, 1, (2, count)) * np.sqrt(3)
    return np.clip(by_arm, 0, 1), moves


def accuracy_scores(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, None]:
    by_arm, moves = chances(case, case.examples, rng)
    chance = by_arm[:, None, :] + run_effects(case, rng)[:, :, None] * moves
    right = rng.random(chance.shape) < chance
    return right[0], right[1], None


def loss_scores(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean loss 1, so that effects in percent are absolute; long examples have less noise."""
    weights = rng.integers(10, 200, case.examples)
    difficulty = rng.gamma(4, 1 / 4, case.examples)
    by_arm = np.stack([difficulty + case.gap / 100, difficulty])
    if case.kind == "apart":
        by_arm = by_arm + rng.normal(0, 0.15, by_arm.shape)
    noise = (rng.gamma(2, 1, (2, case.seeds, case.examples)) - 2) / np.sqrt(2) * 2 / np.sqrt(weights)
    scores = by_arm[:, None, :] + run_effects(case, rng)[:, :, None] + noise
    return scores[0], scores[1], weights


SCORES: dict[str, Callable] = {"accuracy": accuracy_scores, "loss": loss_scores}


def variances(case: Case, rng: np.random.Generator) -> tuple[float, float]:
    """True variance of the estimated difference: (due to examples and noise, due to runs), from a large pool."""
    pool = 400_000
    spread = {"one arm": 1.0, "together": 1.0, "opposed": 3.0}.get(case.kind, 2.0)  # of a difference of run effects
    runs = spread * (case.run_sd / 100) ** 2 / case.seeds
    if case.metric == "accuracy":
        by_arm, _ = chances(case, pool, rng)
        flips = (by_arm * (1 - by_arm)).mean(axis=1).sum()
        return float(flips / case.seeds + (by_arm[0] - by_arm[1]).var()) / case.examples, runs
    weights = rng.integers(10, 200, pool)
    shares = weights / weights.mean()
    noise = 2 * (shares**2 * 4 / weights).mean() / case.seeds
    apart = 2 * 0.15**2 * (shares**2).mean() if case.kind == "apart" else 0.0
    return float(noise + apart) / case.examples, runs


def theory(case: Case, rng: np.random.Generator) -> tuple[float, float]:
    """(power of a test that knows the variances, of one that estimates them from the runs' means), as fractions."""
    shift = case.gap / 100 / np.sqrt(sum(variances(case, rng)))
    z = stats.norm.cdf(shift - 1.959964) + stats.norm.cdf(-shift - 1.959964)
    df = 2 * (case.seeds - 1) or case.examples - 1
    edge = stats.t.ppf(0.975, df)
    return float(z), float(stats.nct.sf(edge, df, shift) + stats.nct.cdf(-edge, df, shift))


def simulate(case: Case, comparisons: int, seed: int = 0) -> dict[str, float]:
    """Shares of intervals that exclude zero (`own`: the true value), and that lie on the wrong side; mean width."""
    rng = np.random.default_rng([seed, case.seeds, case.examples, round(10 * case.run_sd), round(10 * case.gap)])
    excluded, wrong, widths, truth = 0, 0, 0.0, 0.0
    for number in range(comparisons):
        arm, full, weights = SCORES[case.metric](case, rng)
        if case.kind == "own":
            low, high = metric_interval(full, weights=weights, resamples=RESAMPLES, seed=number)
            truth = TRUE_MEAN[case.metric]
        else:
            low, high = paired_difference(arm, full, weights=weights, resamples=RESAMPLES, seed=number).ci95
        excluded += low > truth or high < truth
        wrong += high < 0 if case.gap > 0 else 0
        widths += high - low
    return {"excluded": excluded / comparisons, "wrong_sign": wrong / comparisons, "width": widths / comparisons}


def cases() -> Iterator[Case]:
    for metric in SCORES:
        for seeds in (1, 2, 3, 5):
            for examples in (200, 500):
                for run_sd in (0.0, 0.5, 1.0, 2.0, 4.0):
                    yield Case(metric, "plain", seeds, examples, run_sd)
        for kind in ("apart", "one arm", "together", "opposed", "own"):
            for seeds in (2, 3, 5):
                for run_sd in (0.0, 1.0, 2.0, 4.0) if kind == "apart" else (1.0, 2.0, 4.0):
                    yield Case(metric, kind, seeds, 300, run_sd)
        for seeds in (1, 2, 3, 5):
            for examples in (500, 1200):
                for run_sd in (0.0, 1.0):
                    yield Case(metric, "plain", seeds, examples, run_sd, gap=3.0 if metric == "accuracy" else 1.5)


def mistakes(share: float, seeds: int, count: int, lasting: bool, rng: np.random.Generator) -> np.ndarray:
    """[seeds, count] true with this share: at the same examples in every run, or at others in each."""
    drawn = rng.random((1 if lasting else seeds, count)) < share
    return np.repeat(drawn, seeds, axis=0) if lasting else drawn


def disagreements(kind: str, case: Case, arms: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores of several arms and of full: `rare`, `edge` or `beyond`, `lasting` or not."""
    share = {"rare": 0.005, "edge": 0.01, "beyond": 0.02}[kind.split()[0]]
    shape = case.seeds, case.examples, "lasting" in kind, rng
    full = 1.0 - mistakes(share if "rare" in kind else 0, *shape)
    return [1.0 - mistakes(share, *shape) for _ in range(arms)], full


def of_kind(kind: str, case: Case, arms: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, Any]:
    """Scores of several arms, of full, and the weights of the examples."""
    if kind.split()[0] in ("rare", "edge", "beyond"):
        return *disagreements(kind, case, arms, rng), None
    if arms == 1:
        arm, full, weights = SCORES[case.metric](case, rng)
        return [arm], full, weights
    by_arm, moves = chances(case, case.examples, rng)
    effects = case.run_sd / 100 * rng.standard_normal((arms + 1, case.seeds, 1))
    right = rng.random((arms + 1, case.seeds, case.examples)) < by_arm[1] + effects * moves
    return list(right[:-1]), right[-1], None


def is_false(kind: str, claim: Verdict) -> bool:
    """Whether a verdict is false in this kind of case."""
    return claim in (("equivalent", "better") if kind.startswith(("edge", "beyond")) else ("better", "worse"))


KINDS = ("equal", "together", "opposed", "rare", "rare lasting", "edge", "edge lasting", "beyond", "beyond lasting")


def verdict_rows(comparisons: int, seed: int) -> Iterator[dict[str, Any]]:
    """Share of false verdicts on one arm."""
    for metric, kind in [*(("accuracy", kind) for kind in KINDS), *(("loss", kind) for kind in KINDS[:3])]:
        for seeds in SEEDS:
            for examples in EXAMPLES:
                case = Case(metric, kind, seeds, examples, 1.0 if seeds > 1 else 0.0)
                rng, false = np.random.default_rng([seed, KINDS.index(kind), seeds, examples]), 0
                for number in range(comparisons):
                    (arm,), full, weights = of_kind(kind, case, 1, rng)
                    made = paired_difference(arm, full, weights=weights, resamples=RESAMPLES, seed=number)
                    false += is_false(kind, verdict(made, MARGIN, higher_is_better=metric == "accuracy"))
                shown = {"metric": metric, "kind": kind, "seeds": seeds, "examples": examples}
                yield {**shown, "false": round(false / comparisons, 4)}


def family_rows(comparisons: int, seed: int) -> Iterator[dict[str, Any]]:
    """Share of comparisons of several arms with full that have a false verdict, by accuracy."""
    for kind in ("equal", "edge lasting"):
        for seeds in SEEDS:
            for examples in EXAMPLES:
                case = Case("accuracy", kind, seeds, examples, 1.0 if seeds > 1 else 0.0)
                rng = np.random.default_rng([seed, KINDS.index(kind), seeds, examples])
                alone, together = dict.fromkeys(ARMS, 0), dict.fromkeys(ARMS, 0)
                for number in range(comparisons):
                    arms, full, _ = of_kind(kind, case, max(ARMS), rng)
                    claims = [_claim(arm, full, number, 0.95) for arm in arms]
                    for count in ARMS:
                        alone[count] += any(is_false(kind, claim) for claim in claims[:count])
                        together[count] += any(
                            is_false(kind, _claim(arm, full, number, simultaneous(count)))
                            for arm, claim in zip(arms[:count], claims, strict=False)
                            if claim != "not shown"  # a wider interval shows no more
                        )
                for count in ARMS:
                    yield {"kind": kind, "arms": count, "seeds": seeds, "examples": examples,
                           "alone": round(alone[count] / comparisons, 4),
                           "together": round(together[count] / comparisons, 4)}  # fmt: skip


def _claim(arm: np.ndarray, full: np.ndarray, number: int, confidence: float) -> Verdict:
    made = paired_difference(arm, full, resamples=2 * RESAMPLES, seed=number, confidence=confidence)
    return verdict(made, MARGIN, higher_is_better=True)


def printed(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print rows as they are made, under a heading."""
    made = []
    for row in rows:
        if not made:
            print("".join(f"{key:>15}" for key in row))
        print("".join(f"{value:>15}" for value in row.values()), flush=True)
        made.append(row)
    return made


def one_row_a_line(head: dict, tables: dict[str, list[dict]]) -> str:
    """JSON of `head` and `tables` with one row per line, readable in a diff."""
    text = json.dumps(head, indent=1)[:-2]
    for name, rows in tables.items():
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        text += f',\n "{name}": [\n{lines}\n ]'
    return text + "\n}\n"


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--comparisons", type=int, default=1_000, help="simulated comparisons per row")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulation")
    options = parser.parse_args()
    print(f"{'metric':9}{'kind':10}{'seeds':>6}{'examples':>9}{'run sd':>7}{'gap':>5}{'excluded':>10}  theory z, t")
    rows, start = [], time.perf_counter()
    for case in cases():
        row = asdict(case) | simulate(case, options.comparisons, options.seed)
        row["width"] = round(row["width"], 5)
        line = f"{case.metric:9}{case.kind:10}{case.seeds:6}{case.examples:9}{case.run_sd:7.1f}{case.gap:5.1f}"
        line += f"{row['excluded']:10.1%}"
        if case.gap:
            row["theory_z"], row["theory_t"] = (round(p, 4) for p in theory(case, np.random.default_rng(0)))
            line += f"  {row['theory_z']:6.1%} {row['theory_t']:6.1%}"
        elif case.seeds > 1 and not 0.03 <= row["excluded"] <= 0.07:
            line += "  outside 3 to 7 %"
        print(line, flush=True)
        rows.append(row)
    several = max(1, options.comparisons // 3)
    tables = {
        "rows": rows,
        "verdicts": printed(verdict_rows(options.comparisons, options.seed)),
        "families": printed(family_rows(several, options.seed)),
    }
    head = {
        "comparisons": options.comparisons,
        "comparisons_of_several_arms": several,
        "resamples": RESAMPLES,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
    }
    kept = Path(__file__).with_suffix(".json")
    write_result(options, kept, head | tables, text=one_row_a_line(head, tables))


if __name__ == "__main__":
    main()
