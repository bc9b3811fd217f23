"""The runs of one scan: which are left, how long they may be, and what is written as they end."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json, write_text
from peft_recipes.search.budget import MIN_STEPS, Budget, affordable_steps, run_seconds
from peft_recipes.search.candidates import Candidate, with_learning_rates
from peft_recipes.search.halving import arm_entry, evaluation_steps, pending
from peft_recipes.search.preparation import Preparation
from peft_recipes.search.results import FILE, WINNERS, Scan
from peft_recipes.search.trials import Trial, Trials

# Fields of a recipe that a short run does not read.
_WITHOUT_EFFECT = (
    "title", "description", "margin", "embedded", "name", "metric", "checkpoint_seconds", "arms", "score",
    "answer_pattern", "generation", "test_generations", "judge",
)  # fmt: skip


_PROBE_STEPS = 2  # of the run that measures an arm: one warms up


@dataclass
class Scanner:
    """One call of `scan`: its runs of each arm and the remaining budget."""

    recipe: Recipe
    preparation: Preparation
    seed: int
    budget: Budget
    folder: Path
    on_trial: Callable[[str, dict[str, Any], int, int], None] = lambda *_: None
    steps: int = 0
    notes: list[str] = field(default_factory=list)
    # By arm: the runs' entries in scan.json by learning rate; seconds measured by a probe; seconds to expect of a run.
    runs: dict[str, dict[float, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    probes: dict[str, dict[str, float]] = field(default_factory=dict)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    at_a_time: int = 1

    def __post_init__(self) -> None:
        from peft_recipes.planning import plan

        self.notes = [*self.preparation.notes, *self.notes]
        self.max_steps = max(plan.steps(self.recipe, self.preparation.prepared.rows) or 0, MIN_STEPS)
        self.signature = self._signature()

    @property
    def candidates(self) -> list[Candidate]:
        return self.preparation.candidates

    def _signature(self) -> str:
        """A hash of everything that the runs depend on; learning rates are part of the candidates."""
        from peft_recipes.hardware.environment import code_version

        recipe = self.recipe.to_dict()
        for key in _WITHOUT_EFFECT:
            recipe.pop(key)
        tried = [[one.name, {**one.arm.to_dict(), "learning_rate": one.learning_rates}] for one in self.candidates]
        fingerprint = self.preparation.prepared.fingerprint
        content = json.dumps([recipe, tried, self.seed, fingerprint, code_version()], default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:20]

    def is_complete(self, previous: dict[str, Any]) -> bool:
        """Whether an earlier call finished, and a larger budget than its own would not allow more runs."""
        runs_left = any(
            arm["not_begun"] or any(run["ended"] in ("out of time", "failed") for run in arm["runs"])
            for arm in previous["arms"].values()
        )
        more_time = self.budget.seconds > previous["budget"]["seconds"]
        return not previous["unfinished"] and not (more_time and runs_left)

    def run(self, previous: dict[str, Any] | None, trials: Trials) -> None:
        """Do all runs that are left, as far as the budget allows. previous: scan.json of an earlier call."""
        if previous is not None:
            self.budget.before = previous["budget"]["spent_seconds"]
            self.probes = previous["probes"]
            for name, arm in previous["arms"].items():
                self.runs[name] = {run["learning_rate"]: run for run in arm["runs"]}
            self.steps = previous["steps"] if self._has_begun() else 0
        self.recipe.to_yaml(self.folder / WINNERS)  # later calls take the precision from it
        self.at_a_time = max(min(trials.at_a_time(), len(self.candidates)), 1)
        if trials.note:
            self.notes.append(trials.note)
        self._write(unfinished=True)
        self._probe(trials)
        measured = [one for one in self.candidates if one.name in self.probes]
        self._write(unfinished=True)
        if not measured or any(one.name not in self.probes and not self.runs[one.name] for one in self.candidates):
            return  # the budget ended while the runs were measured
        self.steps = self.steps or self._affordable_steps(measured)
        self.timings = {name: dict(seconds) for name, seconds in self.probes.items()}
        self._write(unfinished=True)
        self._run_all(trials, {one.name: pending(one, self.runs[one.name]) for one in measured})

    def _probe(self, trials: Trials) -> None:
        """Measure the seconds of a run by two steps and one evaluation; all ranks of an arm share one measurement.

        Where it fails, the run is kept as a failed one, and the arm's next rank is measured.
        """
        missing: dict[str, list[Candidate]] = defaultdict(list)
        known = {one.of: self.probes[one.name] for one in self.candidates if one.name in self.probes}
        for one in self.candidates:
            if one.of in known:
                self.probes.setdefault(one.name, known[one.of])
            else:
                missing[one.of].append(one)

        def submit_next(name: str) -> None:
            if missing[name]:
                one = missing[name].pop(0)
                trials.submit(Trial(one, one.learning_rates[0], _PROBE_STEPS, (_PROBE_STEPS,), self.seed))

        for name in list(missing):
            submit_next(name)
        for trial, entry in trials.finished():
            one = trial.candidate
            if entry is None or entry["ended"] == "out of time":
                continue
            if entry["ended"] == "failed":
                self._record(one, trial.learning_rate, entry)
                submit_next(one.of)
                continue
            self.probes |= {each.name: entry["seconds"] for each in (one, *missing[one.of])}
            self._write(unfinished=True)

    def _affordable_steps(self, measured: list[Candidate]) -> int:
        """The steps of each run with which all fit into the budget, so many arms at a time."""
        left, most = self.budget.left, self.max_steps
        steps = affordable_steps(measured, self.probes, left * min(self.at_a_time, len(measured)), most)
        return min([steps, *(affordable_steps([one], self.probes, left, most) for one in measured)])

    def _run_all(self, trials: Trials, left: dict[str, list[float]]) -> None:
        """Do the runs: one of each arm at a time, since halving compares an arm's with its earlier ones.

        One learning rate of each arm in turn, so that all arms share a short budget.
        """

        def submit_next(one: Candidate) -> None:
            if left.get(one.name):
                learning_rate = left[one.name].pop(0)
                others = [run for rate, run in self.runs[one.name].items() if rate != learning_rate]
                expected = run_seconds(self.timings[one.name], self.steps)
                looks = evaluation_steps(self.steps)
                trials.submit(Trial(one, learning_rate, self.steps, looks, self.seed, others, expected))

        for one in self.candidates:
            submit_next(one)
        for trial, entry in trials.finished():
            if entry is not None:
                self._record(trial.candidate, trial.learning_rate, entry)
            submit_next(trial.candidate)

    def _record(self, candidate: Candidate, learning_rate: float, entry: dict[str, Any]) -> None:
        """Add a run to scan.json and report it."""
        name, seconds = candidate.name, entry["seconds"]
        self.runs[name][learning_rate] = entry
        if seconds["step"]:
            timings = self.timings[name]
            timings |= {key: max(timings[key], seconds[key]) for key in ("load", "step", "evaluate")}
        self._write(unfinished=True)
        total = sum(len(one.learning_rates) for one in self.candidates)
        self.on_trial(name, entry, sum(map(len, self.runs.values())), total)

    def _has_begun(self) -> bool:
        """Whether any run is there that did not fail."""
        return any(run["ended"] != "failed" for runs in self.runs.values() for run in runs.values())

    def _enough_seconds(self) -> float | None:
        """While there is no run, a budget with which each has the fewest steps; None before all arms were measured."""
        if self._has_begun() or any(one.name not in self.probes for one in self.candidates):
            return None
        each = [len(one.learning_rates) * run_seconds(self.probes[one.name], MIN_STEPS) for one in self.candidates]
        return self.budget.spent + max(sum(each) / self.at_a_time, *each)

    def _write(self, *, unfinished: bool) -> dict[str, Any]:
        """Write scan.json. It is rewritten after each run: a scan that is killed continues from it."""
        from peft_recipes.hardware.environment import environment

        data = {
            "schema": 1,
            "signature": self.signature,
            "unfinished": unfinished,
            "recipe": self.recipe.name,
            "title": self.recipe.title,
            "embedded": self.recipe.uses_stand_ins,
            "model": self.recipe.model,
            "dataset": self.recipe.data_name,
            "split": "validation",
            "judged_by": "loss",
            "rows": self.preparation.prepared.rows,
            "seed": self.seed,
            "steps": self.steps,
            "recipe_steps": self.max_steps,
            "looks": evaluation_steps(self.steps) if self.steps else [],
            "budget": {
                "seconds": self.budget.seconds,
                "spent_seconds": round(self.budget.spent, 2),
                "enough_seconds": self._enough_seconds(),
            },
            "at_a_time": self.at_a_time,
            "probes": self.probes,
            "arms": {one.name: arm_entry(one, self.runs[one.name]) for one in self.candidates},
            "notes": self.notes,
            "environment": environment(self.preparation.hardware),
        }
        write_json(self.folder / FILE, data)
        return data

    def finish(self) -> Scan:
        """Write the final scan.json, the recipe with the best learning rates and the plot."""
        from peft_recipes.reporting.scan_report import write_scan_plots

        data = self._write(unfinished=False)
        best = {one.name: data["arms"][one.name]["best"] for one in self.candidates}
        winners = {one.name: (one, best[one.name]) for one in self.candidates if best[one.name] is not None}
        recipe = with_learning_rates(self.recipe, winners)
        header = f"# The learning rates of {', '.join(winners) or 'no arm'} come from {FILE} in this folder."
        write_text(self.folder / WINNERS, f"{header}\n{recipe.to_yaml()}")
        write_scan_plots(data, self.folder)
        return Scan(data, self.folder)
