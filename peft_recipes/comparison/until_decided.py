"""`--until-decided`: add seeds until every arm has a verdict, by a plan that is fixed before the first run.

The plan (statistics/sequential.py) is stored as design.json in the comparison's folder before anything is trained, and
goes into comparison.json. A later call goes on with it: finished runs are kept, so every look gives what it gave
before. A plan that changes once it was looked at makes more false claims than it promises, so it is refused.

An arm that is decided gets no more seeds: its interval holds over all looks, whatever the other arms do. Full gets
every seed that an open arm gets, because arms are compared with full seed by seed. An arm that failed twice gets no
more seeds either, and without full there is nothing to compare with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import Run, signature
from peft_recipes.statistics.differences import FULL
from peft_recipes.statistics.sequential import SequentialPlan, plan_seeds

DESIGN_FILE = "design.json"
MOST_SEEDS = 10
_FAILURES = 2  # after which an arm gets no more seeds: what failed twice, as a rule, fails again

Job = tuple[str, int]  # arm, seed
Seeds = dict[str, list[int]]  # of each arm
Look = Callable[["Design"], Mapping[str, Mapping[str, Any]]]  # the differences of comparison.json, by arm


@dataclass(frozen=True)
class Until:
    """What the user asked for. budget: seconds of this call, from its first run."""

    max_seeds: int = MOST_SEEDS
    budget: float | None = None


@dataclass
class Design:
    """The plan of a comparison and how far it is: `data` is design.json, and `design` of comparison.json."""

    folder: Path
    data: dict[str, Any]
    plan: SequentialPlan
    given: Seeds = field(default_factory=dict)

    def store(self, **changes: Any) -> None:
        """Write design.json with these changes."""
        self.data |= {**changes, "seeds_of": self.given}
        write_json(self.folder / DESIGN_FILE, self.data)

    @property
    def run_seeds(self) -> list[int]:
        """The seeds that at least one arm got, in the plan's order."""
        return [seed for seed in self.plan.seeds if any(seed in seeds for seeds in self.given.values())]

    def due(self, arm: str, seed: int) -> bool:
        """Whether an arm got a seed, and it was trained."""
        return seed in self.given.get(arm, ())

    def may_need(self, arm: str, seed: int) -> bool:
        """Whether an arm got a seed or may still get it: it is neither decided nor given up."""
        ended = [*self.data.get("decided", ()), *self.data.get("given_up", ())]
        return self.due(arm, seed) or arm not in ended


def check_plan(names: Sequence[str], seeds: Sequence[int], until: Until) -> SequentialPlan:
    """Return the plan of seeds. Raises RecipeError: no full to compare with, no other arm, too few seeds."""
    if FULL not in names:
        raise RecipeError(f"--until-decided decides how each arm compares with '{FULL}': add '{FULL}' to --arms.")
    if len(names) < 2:
        raise RecipeError(f"--until-decided decides how arms compare with '{FULL}': name another arm in --arms.")
    try:
        return plan_seeds(seeds, until.max_seeds, len(names) - 1)
    except ValueError as error:
        raise RecipeError(f"--max-seeds {until.max_seeds}: {error}.") from None


def make_design(
    folder: Path, recipe: Recipe, names: Sequence[str], plan: SequentialPlan, fingerprint: str, *, overwrite: bool
) -> Design:
    """Read the design of a comparison's folder, or make one; write nothing.

    Raises RecipeError where the folder's plan was looked at already and is another one. Where the recipe, the data or
    the code changed, its runs are trained again and a new plan starts.
    """
    asked = {
        "schema": 1,
        **plan.to_dict(),
        "arms": list(names),
        "metric": recipe.metric,
        "margin": recipe.margin,
        "signatures": {arm: signature(recipe, arm, 0, fingerprint) for arm in names},
    }
    old = _read(folder / DESIGN_FILE)
    same_runs = old is not None and all(
        old["signatures"].get(arm, mark) == mark for arm, mark in asked["signatures"].items()
    )
    if same_runs and not overwrite:
        changed = _changes(old, asked)
        if not changed:
            return Design(folder, {**old, "ended": None}, plan)
        if old["looks"]:
            other = max([*old["seeds"], *plan.seeds]) + 1
            raise RecipeError(
                f"{folder / DESIGN_FILE} holds a plan that was looked at {_times(len(old['looks']))} already, and now "
                f"another one is asked for: {'; '.join(changed)}. A plan that changes after a look makes more false "
                "claims. Go on with the plan as it is, or start a new one on seeds that it has not seen: "
                f"--output ANOTHER --seeds {other}."
            )
    looked = len(old["looks"]) if same_runs else 0
    return Design(folder, {**asked, "looks": [], "finished_before": None, "earlier_looks": looked}, plan)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        SequentialPlan.from_dict(data)
        if missing := [key for key in ("signatures", "looks", "arms", "metric", "margin") if key not in data]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return data
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path} can't be read as a plan of seeds ({error}). Restore it; or delete it, and a new plan starts."
        ) from None


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the stored plan and the one that is asked for, in words."""
    pairs = {
        "at most {} seeds": [len(plan["seeds"]) for plan in (old, new)],
        "arms {}": [", ".join(plan["arms"]) for plan in (old, new)],
        "metric {}": [plan["metric"] for plan in (old, new)],
        "margin {}": ["the default" if plan["margin"] is None else plan["margin"] for plan in (old, new)],
        "first look at {} seeds": [plan["first"] for plan in (old, new)],
    }
    changed = [f"{words.format(before)} became {after}" for words, (before, after) in pairs.items() if before != after]
    if not changed and old["seeds"] != new["seeds"]:
        changed = [f"seeds {', '.join(map(str, old['seeds']))} became {', '.join(map(str, new['seeds']))}"]
    return changed


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def looked_at_before(folder: Path) -> list[str]:
    """The note of a comparison with a fixed number of seeds in a folder whose seeds a plan had added."""
    design = _read(folder / DESIGN_FILE)
    if design is None or not design["looks"]:
        return []
    return [
        "Seeds were added here until it was decided. These intervals are those of a number of seeds that is fixed "
        "beforehand: they don't count the looks, so they make more false claims than 5 %. `--until-decided` has those "
        "that do."
    ]


def add_seeds(
    design: Design,
    until: Until,
    missing: Callable[[Iterable[Job]], list[Job]],
    train: Callable[[list[Job]], None],
    read: Callable[[Job], Run],
    look: Look,
    stopped: Collection[str] = (),
) -> None:
    """Train seed after seed until every arm is decided, the plan ends, or the time.

    missing: of some runs, those that have to be trained. train: trains the missing ones. read: a run that was trained.
    look: returns the differences of the arms from full, by the seeds they have so far. stopped: the arms of which the
    user wants no more, which grow while it trains; they are given up with the seeds that they have. `design` is stored
    before the first run, after each round, and with the reason for the end: "decided", "max-seeds", "budget", "stopped"
    or "failed".
    """
    plan, names = design.plan, design.data["arms"]
    design.given = {arm: [] for arm in names}
    if design.data["finished_before"] is None:
        todo = set(missing((arm, seed) for seed in plan.seeds for arm in names))
        others = [arm for arm in names if arm != FULL]
        design.data["finished_before"] = [
            seed for seed in plan.seeds if not {(FULL, seed)} & todo and not todo.issuperset((a, seed) for a in others)
        ]
    design.store(decided={}, given_up=[], ended=None)  # what was decided by an earlier call is found again
    clock, active, ended = _Clock(until.budget), list(names), "max-seeds"
    # The seeds before the first look may run side by side; with a budget each is a decision of its own.
    start = 1 if until.budget is not None else plan.first
    for number in range(start, len(plan.seeds) + 1):
        seeds = plan.seeds[:number] if number == start else plan.seeds[number - 1 : number]
        jobs = [(arm, seed) for seed in seeds for arm in active]
        wanted = missing(jobs)
        if not clock.fits(wanted):
            ended = "budget"
            break
        began = time.monotonic()
        train(jobs)
        halted = {job for job in jobs if job[0] in stopped and not read(job).ok}
        for arm, seed in jobs:
            if (arm, seed) not in halted:
                design.given[arm].append(seed)
        clock.record(jobs, wanted, read, time.monotonic() - began)
        failed = [arm for arm in active if sum(not read((arm, s)).ok for s in design.given[arm]) >= _FAILURES]
        failed += [arm for arm in active if arm not in failed and any(arm == job[0] for job in halted)]
        active = [arm for arm in active if arm not in failed]
        if number >= plan.first:
            active = _look(design, number, active, look)
        design.store(given_up=[*design.data["given_up"], *failed])
        if FULL not in active or active == [FULL]:
            ended = "decided" if len(design.data["decided"]) == len(names) - 1 else "stopped" if stopped else "failed"
            break
    design.store(ended=ended)


def _look(design: Design, number: int, active: list[str], look: Look) -> list[str]:
    """Record a look; return the arms that are still open, with full."""
    differences, decided = look(design), dict(design.data["decided"])
    for arm in active:
        entry = differences.get(arm)
        if arm != FULL and entry and (made := entry.get("verdict_simultaneous", entry["verdict"])) != "not shown":
            decided[arm] = {"seeds": entry["seeds"], "verdict": made}
    looks = {made["seeds"]: made for made in design.data["looks"]} | {number: {"seeds": number, "decided": [*decided]}}
    design.data |= {"decided": decided, "looks": [looks[key] for key in sorted(looks)]}
    return [arm for arm in active if arm not in decided]


class _Clock:
    """Whether the next runs fit into what is left of the budget, by the time that earlier ones took."""

    def __init__(self, budget: float | None):
        self.end = None if budget is None else time.monotonic() + budget
        self.slowest: dict[str, float] = {}  # seconds of a run of each arm, as its run.json says
        self.factors: list[float] = []  # time of a round here per second of its runs: processes start; `jobs` at a time

    def record(self, jobs: Sequence[Job], trained: Sequence[Job], read: Callable[[Job], Run], seconds: float) -> None:
        """Take down what these jobs took, of which those `trained` now took `seconds` together."""
        taken = {job: (read(job).data.get("seconds") or {}).get("total") or 0.0 for job in jobs}
        for (arm, _), own in taken.items():
            self.slowest[arm] = max(own, self.slowest.get(arm, 0.0))
        if total := sum(taken[job] for job in trained):
            self.factors.append(seconds / total)

    def fits(self, jobs: Sequence[Job]) -> bool:
        """Whether these runs will end in time. The first ones, of which nothing is known, are started."""
        if self.end is None or not jobs:
            return True
        left, typical = self.end - time.monotonic(), max(self.slowest.values(), default=0.0)
        expected = sum(self.slowest.get(arm) or typical for arm, _ in jobs)
        return left > 0 and max(self.factors, default=1.0) * expected <= left
