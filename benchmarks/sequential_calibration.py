"""Simulated false claims, power and number of seeds of `compare --until-decided`, next to fixed numbers of seeds.

    python benchmarks/sequential_calibration.py                     # the tables
    python benchmarks/sequential_calibration.py --comparisons 100   # a quick look

Each row simulates comparisons of an arm with full, seed after seed, with the scores of statistics_calibration.py. After
each seed from the third on, the interval of the plan is computed, until it gives a verdict or the most seeds are
reached. Next to it: the 95 % interval looked at as often (`naive`), and looked at once, at the most seeds (`fixed`).

`equal`: no true difference, so that `better` and `worse` are false. `edge`: the arm is worse by exactly the margin, so
that `equivalent` and `better` are false. `together`, `opposed` and `one arm` are equal arms as in
statistics_calibration.py. The margin is 3 points of accuracy, or 1.5 % of the loss; `run_sd` and `gap` are in these
units. Rows with `power` have a true verdict: equivalent without a gap, else worse; `mean_seeds` is the average number
of seeds that the plan took, and `fixed_seeds` the smallest fixed number of seeds with at least the same power.

The second table has several arms compared with one full. An arm that is decided gets no more seeds; `false` is the
share of comparisons with at least one false verdict, by the intervals that hold together.

Finished rows are kept in the output file: a run that was interrupted goes on with the next (--overwrite: anew).
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from harness import result_parser, write_result
from statistics_calibration import SCORES, Case, chances, one_row_a_line

from peft_recipes.runs.files import write_text
from peft_recipes.statistics.bootstrap import Verdict, paired_difference, verdict
from peft_recipes.statistics.sequential import SequentialPlan, plan_seeds

RESAMPLES = 1_000
MARGIN = {"accuracy": 3.0, "loss": 1.5}  # points, percent
EXAMPLES = {"accuracy": (300, 1_000), "loss": (100, 300)}  # resampling losses takes longer
Scores = tuple[np.ndarray, np.ndarray, Any]


@dataclass(frozen=True)
class Row:
    """One row of the first table; `most`: the most seeds of the plan."""

    metric: str
    kind: str
    most: int
    examples: int
    run_sd: float
    gap: float = 0.0

    @property
    def case(self) -> Case:
        kind = self.kind if self.kind in ("together", "opposed", "one arm") else "plain"
        return Case(self.metric, kind, self.most, self.examples, self.run_sd, self.gap)


def claim(row: Row, scores: Scores, seeds: int, confidence: float, number: int) -> Verdict:
    arm, full, weights = scores
    options = {"weights": weights, "resamples": RESAMPLES, "seed": number, "confidence": confidence}
    made = paired_difference(arm[:seeds], full[:seeds], **options)
    return verdict(made, MARGIN[row.metric] / 100, higher_is_better=row.metric == "accuracy")


def first_claim(claims: list[Verdict], first: int) -> tuple[Verdict, int]:
    """The verdict of the first look that has one, else of the last; and the number of seeds at it."""
    for look, made in enumerate(claims):
        if made != "not shown":
            return made, first + look
    return "not shown", first + len(claims) - 1


def by_plan(row: Row, scores: Scores, plan: SequentialPlan, number: int, comparisons: int = 1) -> tuple[Verdict, int]:
    for seeds in range(plan.first, row.most + 1):
        made = claim(row, scores, seeds, plan.confidence(seeds, comparisons), number)
        if made != "not shown":
            break
    return made, seeds


def right_and_false(row: Row) -> tuple[tuple[Verdict, ...], tuple[Verdict, ...]]:
    """The true verdicts, and the false ones. A gap makes accuracy and loss larger: a worse arm's is negative."""
    if row.kind == "edge":
        return ("worse",), ("equivalent", "better")
    if row.gap:
        return ("worse",), ("better", "equivalent") if abs(row.gap) >= MARGIN[row.metric] else ("better",)
    return ("equivalent",), ("better", "worse")


def simulate(row: Row, comparisons: int, seed: int) -> dict[str, Any]:
    plan = plan_seeds((), row.most, 1)
    looks = range(plan.first, row.most + 1)
    rng = np.random.default_rng([seed, row.most, row.examples, round(10 * row.run_sd), round(abs(10 * row.gap))])
    made: list[tuple[Verdict, int]] = []
    naive: list[Verdict] = []
    fixed: list[list[Verdict]] = []
    for number in range(comparisons):
        scores = SCORES[row.metric](row.case, rng)
        made.append(by_plan(row, scores, plan, number))
        fixed.append([claim(row, scores, seeds, 0.95, number) for seeds in looks])
        naive.append(first_claim(fixed[-1], plan.first)[0])
    right, false = right_and_false(row)
    power = sum(claim in right for claim, _ in made) / comparisons
    powers = [sum(claims[look] in right for claims in fixed) / comparisons for look in range(len(looks))]
    enough = (seeds for seeds, reached in zip(looks, powers, strict=True) if reached >= power)
    return {
        "false": round(sum(claim in false for claim, _ in made) / comparisons, 4),
        "naive_false": round(sum(claim in false for claim in naive) / comparisons, 4),
        "fixed_false": round(sum(claims[-1] in false for claims in fixed) / comparisons, 4),
        "power": round(power, 4),
        "fixed_power": round(powers[-1], 4),
        "mean_seeds": round(sum(seeds for _, seeds in made) / comparisons, 2),
        "fixed_seeds": next(enough, row.most),
    }


def rows() -> Iterator[Row]:
    for metric in SCORES:
        worse = -MARGIN[metric] if metric == "accuracy" else MARGIN[metric]
        for most in (5, 10):
            for examples in EXAMPLES[metric]:
                for run_sd in (0.0, 1.0, 3.0):
                    yield Row(metric, "equal", most, examples, run_sd)
                    yield Row(metric, "edge", most, examples, run_sd, worse)
        for kind in ("together", "opposed", "one arm"):
            for run_sd in (1.0, 3.0):
                yield Row(metric, kind, 10, EXAMPLES[metric][0], run_sd)
    for gap in (-1.5, -6.0):
        for run_sd in (1.0, 3.0):
            yield Row("accuracy", "worse", 10, 1_000, run_sd, gap)


def family_rows() -> Iterator[tuple[Row, int]]:
    for kind in ("equal", "edge"):
        for arms in (2, 5, 12):
            yield Row("accuracy", kind, 10, 300, 1.0, -3.0 if kind == "edge" else 0.0), arms


def simulate_family(row: Row, arms: int, comparisons: int, seed: int) -> dict[str, Any]:
    """Several arms whose run effects are their own; each is decided by itself, with the same full."""
    plan = plan_seeds((), row.most, arms)
    rng = np.random.default_rng([seed, arms, round(10 * row.run_sd), row.kind == "edge"])
    _, false = right_and_false(row)
    wrong, seeds = 0, 0.0
    for number in range(comparisons):
        (worse, plain), moves = chances(row.case, row.examples, rng)
        effects = row.run_sd / 100 * rng.standard_normal((arms + 1, row.most, 1))
        by_arm = np.stack([*[worse] * arms, plain])[:, None, :]
        right = (rng.random((arms + 1, row.most, row.examples)) < by_arm + effects * moves).astype(float)
        made = [by_plan(row, (arm, right[-1], None), plan, number, arms) for arm in right[:-1]]
        wrong += any(claim in false for claim, _ in made)
        seeds += sum(used for _, used in made) / arms
    return {
        "false": round(wrong / comparisons, 4),
        "mean_seeds": round(seeds / comparisons, 2),
    }


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--comparisons", type=int, default=1_000, help="simulated comparisons per row")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulation")
    parser.add_argument("--overwrite", action="store_true", help="simulate finished rows again")
    options = parser.parse_args()
    path = Path(__file__).with_suffix(".json") if options.keep else options.output
    head = {
        "comparisons": options.comparisons,
        "comparisons_of_several_arms": max(1, options.comparisons // 3),
        "resamples": RESAMPLES,
        "seed": options.seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
    }
    kept: dict[str, Any] = {}
    if path is not None and path.is_file() and not options.overwrite:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = found if {key: found.get(key) for key in head} == head else {}
    tables: dict[str, list[dict[str, Any]]] = {"rows": [], "families": []}
    todo = [("rows", asdict(row), row, 1) for row in rows()]
    todo += [("families", {**asdict(row), "arms": arms}, row, arms) for row, arms in family_rows()]
    for table, named, row, arms in todo:
        start = time.perf_counter()
        made = next((old for old in kept.get(table, []) if named.items() <= old.items()), None)
        if made is None and table == "rows":
            made = named | simulate(row, head["comparisons"], options.seed)
        elif made is None:
            made = named | simulate_family(row, arms, head["comparisons_of_several_arms"], options.seed)
        made.setdefault("seconds", round(time.perf_counter() - start, 1))
        tables[table].append(made)
        print(json.dumps(made), file=sys.stderr, flush=True)
        if path is not None:  # a call that is cut off goes on from there
            write_text(path, one_row_a_line(head, tables))
    text = one_row_a_line(head, tables)
    write_result(options, Path(__file__).with_suffix(".json"), {**head, **tables}, text=text)


if __name__ == "__main__":
    main()
