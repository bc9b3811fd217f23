"""The runs of one scan: which are left, how long they may be, and what is written as they end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json, write_text
from peft_recipes.search.budget import MIN_STEPS, Budget, affordable_steps, run_seconds
from peft_recipes.search.candidates import Candidate, with_learning_rates
from peft_recipes.search.halving import arm_entry, evaluation_steps, keep_training, pending, run_entry

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.hardware.device import Hardware
    from peft_recipes.search.remote_trials import RemoteTrials
    from peft_recipes.search.short_runs import ShortRun
    from peft_recipes.tasks.base import Task

from peft_recipes.search.results import FILE, WINNERS, Scan

# Fields of a recipe that a short run does not read.
_WITHOUT_EFFECT = (
    "title", "description", "margin", "embedded", "name", "metric", "checkpoint_seconds", "arms", "score",
    "answer_pattern", "generation", "test_generations", "judge",
)  # fmt: skip


@dataclass
class Scanner:
    """One call of `scan`: the prepared data, the runs of each arm and the remaining budget."""

    recipe: Recipe
    candidates: list[Candidate]
    seed: int
    budget: Budget
    folder: Path
    on_trial: Callable[[str, dict[str, Any], int, int], None] = lambda *_: None
    steps: int = 0
    # By arm: the runs' entries in scan.json by learning rate; seconds measured by a probe; seconds to expect of a run.
    runs: dict[str, dict[float, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    probes: dict[str, dict[str, float]] = field(default_factory=dict)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)

    def prepare(self, load_base: bool = True) -> None:
        """Prepare the data without its test split and check all candidates before the first run."""
        from peft_recipes.arms.apply import fit_targets
        from peft_recipes.hardware.device import choose
        from peft_recipes.models import bases
        from peft_recipes.planning import memory, plan
        from peft_recipes.tasks.registry import task_of

        self.hardware: Hardware = choose(self.recipe.training, self.recipe.threads)
        recipe = with_learning_rates(self.recipe, {one.name: (one, one.learning_rates[0]) for one in self.candidates})
        self.task: Task = task_of(recipe)
        self.task.reads_test = False
        self.prepared: Prepared = self.task.prepare()
        config = bases.load_config(recipe, **self.task.base_options(self.prepared))
        recipe, notes = fit_targets(recipe, config)
        self.notes, self.task.recipe = [*self.prepared.notes, *notes], recipe
        self.task.check_arguments(None, self.hardware)
        for i, one in enumerate(self.candidates):
            arm = dataclasses.replace(recipe.arms[one.name], learning_rate=one.arm.learning_rate)
            self.candidates[i] = dataclasses.replace(one, arm=arm)
        problems = []
        for one in self.candidates:
            try:
                self.task.check_arguments(one.arm, self.hardware)
                needs = memory.memory(self.task, self.prepared, config, one.name)
                if not needs["fits"] and "memory" not in self.recipe.skip_checks:
                    problems.append(memory.too_large(one.name, needs, self.recipe))
            except RecipeError as error:
                problems += error.problems
        if problems:
            raise RecipeError(*problems)
        self.max_steps = max(plan.steps(self.recipe, self.prepared.rows) or 0, MIN_STEPS)
        self.signature = self._signature()
        # Loaded once and dropped: pretraining of a stand-in and first imports must not count as a run's loading time.
        if load_base:
            self.task.load_base(self.prepared)

    def _signature(self) -> str:
        """A hash of everything that the runs depend on; learning rates are part of the candidates."""
        from peft_recipes.hardware.environment import code_version

        recipe = self.recipe.to_dict()
        for key in _WITHOUT_EFFECT:
            recipe.pop(key)
        tried = [[one.name, {**one.arm.to_dict(), "learning_rate": one.learning_rates}] for one in self.candidates]
        content = json.dumps([recipe, tried, self.seed, self.prepared.fingerprint, code_version()], default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:20]

    def is_complete(self, previous: dict[str, Any]) -> bool:
        """Whether an earlier call finished, and a larger budget than its own would not allow more runs."""
        runs_left = any(
            arm["not_begun"] or any(run["ended"] == "out of time" for run in arm["runs"])
            for arm in previous["arms"].values()
        )
        more_time = self.budget.seconds > previous["budget"]["seconds"]
        return not previous["unfinished"] and not (more_time and runs_left)

    def run(self, previous: dict[str, Any] | None, remote: RemoteTrials | None = None) -> None:
        """Do all runs that are left, as far as the budget allows. previous: scan.json of an earlier call."""
        if previous is not None:
            self.budget.before = previous["budget"]["spent_seconds"]
            self.steps, self.probes = previous["steps"], previous["probes"]
            for name, arm in previous["arms"].items():
                self.runs[name] = {run["learning_rate"]: run for run in arm["runs"]}
        self.recipe.to_yaml(self.folder / WINNERS)  # later calls take the precision from it
        if remote is not None:
            self._probe_on(remote)
        for one in self.candidates:
            if one.name not in self.probes and self.budget.left > 0:
                self.probes[one.name] = self._probe(one)
        if not self.steps and len(self.probes) == len(self.candidates):
            self.steps = self._affordable_steps(1 if remote is None else remote.at_a_time(self.recipe))
        self.timings = {name: dict(seconds) for name, seconds in self.probes.items()}
        self._write(unfinished=True)
        if not self.steps:
            return
        left = {one.name: pending(one, self.runs[one.name]) for one in self.candidates}
        if remote is not None:
            return self._run_on(remote, left)
        while any(left.values()):  # one learning rate of each arm in turn, so that all arms share a short budget
            for one in self.candidates:
                if left[one.name]:
                    self._next(one, left[one.name].pop(0))

    def _affordable_steps(self, at_a_time: int) -> int:
        """The steps of each run with which all fit into the budget, so many arms at a time."""
        left, most = self.budget.left, self.max_steps
        steps = affordable_steps(self.candidates, self.probes, left * min(at_a_time, len(self.candidates)), most)
        return min([steps, *(affordable_steps([one], self.probes, left, most) for one in self.candidates)])

    def _probe_on(self, remote: RemoteTrials) -> None:
        """Measure one run of each arm on the cluster."""
        self.notes.append("Trained on the nodes of a Ray cluster: the seconds are theirs, this environment is not.")
        first = {one.of: one for one in reversed(self.candidates) if one.name not in self.probes}
        for one in first.values():
            self._submit(remote, one, one.learning_rates[0], 2, [2])
        for done, _, entry in remote.finished():
            self.probes |= {one.name: entry["seconds"] for one in self.candidates if one.of == done.of}

    def _run_on(self, remote: RemoteTrials, left: dict[str, list[float]]) -> None:
        """Do the runs on the cluster: one of each arm at a time; an arm's next one as soon as one has ended."""

        def submit_next(one: Candidate) -> None:
            if left[one.name] and run_seconds(self.timings[one.name], self.steps) <= self.budget.left:
                self._submit(remote, one, left[one.name].pop(0), self.steps, evaluation_steps(self.steps))

        for one in self.candidates:
            submit_next(one)
        for one, learning_rate, entry in remote.finished():
            self._record(one, learning_rate, entry)
            submit_next(one)
        remote.clear(self.folder)

    def _submit(
        self, remote: RemoteTrials, one: Candidate, learning_rate: float, steps: int, evaluate_after: list[int]
    ) -> None:
        others = [run for rate, run in self.runs[one.name].items() if rate != learning_rate]
        options = {"seed": self.seed, "others": others, "seconds": max(self.budget.left, 1.0)}
        remote.submit(
            self.recipe, one, learning_rate, self.folder, steps=steps, evaluate_after=evaluate_after, **options
        )

    def _probe(self, candidate: Candidate) -> dict[str, float]:
        """Measure the seconds of a run by two steps and one evaluation; all ranks of an arm share one measurement."""
        for other in self.candidates:
            if other.of == candidate.of and other.name in self.probes:
                return self.probes[other.name]
        return self.train(candidate, candidate.learning_rates[0], 2, [2]).seconds

    def train(
        self, candidate: Candidate, learning_rate: float, steps: int, evaluate_after: list[int], **options: Any
    ) -> ShortRun:
        """Train one candidate in this process. options: of `short_run`."""
        from peft_recipes.search.short_runs import short_run
        from peft_recipes.tasks.method_mixin import fit_schedules

        name, arm = candidate.name, dataclasses.replace(candidate.arm, learning_rate=learning_rate)
        recipe = fit_schedules(dataclasses.replace(self.recipe, arms={name: arm}, embedded={}), steps)[0]
        arm = recipe.arms[name]
        return short_run(
            self.task, self.prepared, arm, name, steps, evaluate_after, self.hardware, seed=self.seed, **options
        )

    def _next(self, candidate: Candidate, learning_rate: float) -> None:
        """Do one run and write scan.json, unless a full run would exceed the budget."""
        runs, timings = self.runs[candidate.name], self.timings[candidate.name]
        if run_seconds(timings, self.steps) > self.budget.left:
            return
        others = [run for other, run in runs.items() if other != learning_rate]
        run = self.train(
            candidate,
            learning_rate,
            self.steps,
            evaluation_steps(self.steps),
            keep_training=lambda run: keep_training(run, others),
            deadline=self.budget.deadline,
        )
        self._record(candidate, learning_rate, run_entry(run))

    def _record(self, candidate: Candidate, learning_rate: float, entry: dict[str, Any]) -> None:
        """Add a run to scan.json and report it."""
        name, timings, seconds = candidate.name, self.timings[candidate.name], entry["seconds"]
        self.runs[name][learning_rate] = entry
        if seconds["step"]:
            timings |= {key: max(timings[key], seconds[key]) for key in ("load", "step", "evaluate")}
        self._write(unfinished=True)
        total = sum(len(one.learning_rates) for one in self.candidates)
        self.on_trial(name, entry, sum(map(len, self.runs.values())), total)

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
            "rows": self.prepared.rows,
            "seed": self.seed,
            "steps": self.steps,
            "recipe_steps": self.max_steps,
            "looks": evaluation_steps(self.steps) if self.steps else [],
            "budget": {"seconds": self.budget.seconds, "spent_seconds": round(self.budget.spent, 2)},
            "probes": self.probes,
            "arms": {one.name: arm_entry(one, self.runs[one.name]) for one in self.candidates},
            "notes": self.notes,
            "environment": environment(self.hardware),
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
