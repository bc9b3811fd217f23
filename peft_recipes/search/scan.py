"""A scan: which learning rate, and which rank, suits each arm of a recipe, within a budget of time.

Short runs on the train split, judged by the validation loss alone; the test split is never read. Successive halving
(studies.py) ends the worse of them early. How long they are follows from the budget and from the step times that are
measured first; a run that would overrun the budget is not begun.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import check_output, clear, make_folder, write_json, write_text
from peft_recipes.runs.lock import locked
from peft_recipes.search.budget import LEAST_STEPS, Budget, affordable_steps, run_seconds
from peft_recipes.search.candidates import Candidate, candidates, with_rates
from peft_recipes.search.studies import (  # fmt: skip
    arm_data,
    goes_on,
    marks_of,
    next_trial,
    plain_run,
    require_optuna,
    storage_at,
    study_of,
    tell,
    told,
)
from peft_recipes.training.interruption import terminable
from peft_recipes.training.resolve import with_precision

if TYPE_CHECKING:
    import optuna

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.hardware.device import Hardware
    from peft_recipes.search.short_runs import ShortRun
    from peft_recipes.tasks.base import Task

FOLDER, FILE, JOURNAL, WINNERS = "scan", "scan.json", "journal.jsonl", "recipe.yaml"


class Scan:
    """A scan, finished or cut off by its budget: `data` is scan.json, `folder` where it lies."""

    def __init__(self, data: dict[str, Any], folder: Path):
        self.data, self.folder = data, folder

    @property
    def best(self) -> dict[str, float]:
        """The best rate of each arm that has one."""
        return {name: arm["best"] for name, arm in self.data["arms"].items() if arm["best"] is not None}

    @property
    def recipe(self) -> Path:
        """The recipe file with the winners, which `compare` takes."""
        return self.folder / WINNERS

    def __repr__(self) -> str:
        return f"Scan({self.data['recipe']}: {', '.join(f'{k} {v:g}' for k, v in self.best.items())})"


def scan(
    recipe: Recipe,
    rates: Sequence[float] | None = None,
    arms: Iterable[str] | None = None,
    ranks: Sequence[int] | None = None,
    *,
    budget: float = 600.0,
    seed: int = 0,
    output: str | Path = "adapters",
    overwrite: bool = False,
    wait: bool = False,
    gone: float = 0.0,
    on_trial: Callable[[str, dict[str, Any], int, int], None] | None = None,
) -> Scan:
    """Tries every arm (at every rank) at every rate, and writes scan.json, recipe.yaml and a plot to <recipe>/scan.

    rates: None for a few around each arm's own. budget: seconds for all of it, loading included. A scan that was killed
    goes on when it is called again, with what is left of its budget; a finished one is returned as it is. gone: seconds
    of the budget that were used before this call. on_trial: told of every run that ends: its arm, what came of it, its
    number and how many there are. Raises RecipeError for a mistake in what was given (then nothing is written),
    KeyboardInterrupt or Terminated after a signal.
    """
    from peft_recipes.arms.selection import choose_arms

    require_optuna()
    if not math.isfinite(budget) or budget <= 0:
        raise RecipeError(f"budget: expected seconds above 0, got {budget}.")
    output = Path(output)
    check_output(output)
    folder = output / recipe.name / FOLDER
    clock = Budget(budget, gone)
    named = choose_arms(recipe, arms)
    recipe, chosen = named.recipe, candidates(named.recipe, named.names, rates, ranks)
    before = None if overwrite else _read(folder / FILE)
    recipe = with_precision(recipe, folder if before else None)
    work = _Work(recipe, chosen, seed, clock, folder, on_trial or (lambda *_: None))
    work.prepare()
    work.notes += named.notes
    if before is not None and before["signature"] != work.signature:
        raise RecipeError(
            f"{folder} holds a scan of another recipe, range, data or code. Replace it with --overwrite, or name "
            "another --output."
        )
    make_folder(folder)
    with terminable(), locked(folder, wait=wait):
        if before is None:
            clear(folder, keep=(".lock", ".lock-holder"))
        work.go_on(before)
        return work.done()


@dataclass
class _Arm:
    """A candidate while it is scanned. figures: the seconds that loading, a step and an evaluation take."""

    candidate: Candidate
    study: optuna.Study
    figures: dict[str, float]


class _Work:
    """One call of a scan: its clock, its plan, its runs."""

    def __init__(
        self, recipe: Recipe, chosen: list[Candidate], seed: int, budget: Budget, folder: Path,
        on_trial: Callable[[str, dict[str, Any], int, int], None],
    ):  # fmt: skip
        self.recipe, self.chosen, self.seed, self.budget, self.folder = recipe, chosen, seed, budget, folder
        self.on_trial = on_trial
        self.arms: dict[str, _Arm] = {}
        self.probes: dict[str, dict[str, float]] = {}
        self.steps = 0

    def prepare(self) -> None:
        """The data without its test split, and what can be found wrong before the first run."""
        from peft_recipes.arms.apply import fit_targets
        from peft_recipes.hardware.device import choose
        from peft_recipes.models import bases
        from peft_recipes.planning import plan
        from peft_recipes.tasks.registry import task_of

        self.hardware: Hardware = choose(self.recipe.training, self.recipe.threads)
        tried = with_rates(self.recipe, {one.name: (one, one.rates[0]) for one in self.chosen})
        self.task: Task = task_of(tried)
        self.task.reads_test = False
        self.prepared: Prepared = self.task.prepare()
        config = bases.load_config(tried, **self.task.base_options(self.prepared))
        tried, notes = fit_targets(tried, config)
        self.notes, self.task.recipe = [*self.prepared.notes, *notes], tried
        self.task.check_arguments(None, self.hardware)
        fitted = {one.name: dataclasses.replace(tried.arms[one.name], learning_rate=one.arm.learning_rate)
                  for one in self.chosen}  # fmt: skip
        self.chosen = [Candidate(one.name, fitted[one.name], one.rates, one.of) for one in self.chosen]
        problems = []
        for one in self.chosen:
            try:
                self.task.check_arguments(one.arm, self.hardware)
                needs = plan.memory(self.task, self.prepared, config, one.arm, one.name)
                if not needs["fits"] and "memory" not in self.recipe.skip_checks:
                    problems.append(plan.too_large(one.name, needs, self.recipe))
            except RecipeError as error:
                problems += error.problems
        if problems:
            raise RecipeError(*problems)
        self.most = max(plan.steps(self.recipe, self.prepared.rows) or 0, LEAST_STEPS)
        self.signature = self._signature()
        self.task.load_base(self.prepared)  # once for nothing: a base that is trained first, and what is imported then

    def _signature(self) -> str:
        from peft_recipes.hardware.environment import code_version

        plain = self.recipe.to_dict()
        for key in ("title", "description", "margin", "embedded", "name", "metric", "checkpoint_seconds", "arms"):
            plain.pop(key)
        tried = [[one.name, {**one.arm.to_dict(), "learning_rate": one.rates}] for one in self.chosen]
        said = json.dumps([plain, tried, self.seed, self.prepared.fingerprint, code_version()], default=str)
        return hashlib.sha256(said.encode()).hexdigest()[:20]

    def go_on(self, before: dict[str, Any] | None) -> None:
        """All runs that are still to be done, as far as the budget goes."""
        if before is not None:
            self.budget.before = before["budget"]["spent_seconds"]
            self.steps, self.probes = before["steps"], before["probes"]
            if not before["unfinished"] and not self._more_to_do(before):
                self.before = before
                return
        self.before = None
        self.recipe.to_yaml(self.folder / WINNERS)  # its precision is the scan's from here on
        for one in self.chosen:
            if one.name not in self.probes and self.budget.left > 0:
                self.probes[one.name] = self._probe(one)
        probed = [one for one in self.chosen if one.name in self.probes]
        if not self.steps and len(probed) == len(self.chosen):
            self.steps = affordable_steps(self.chosen, self.probes, self.budget.left, self.most)
        storage = storage_at(self.folder / JOURNAL)
        for one in self.chosen:
            self.arms[one.name] = _Arm(one, study_of(storage, one), dict(self.probes.get(one.name, {})))
        self._keep(unfinished=True)
        if not self.steps:
            return
        most = max(len(one.rates) for one in self.chosen)
        for _ in range(most):  # one rate of each arm in turn, so that a short budget is shared
            for arm in self.arms.values():
                self._next(arm)

    def _more_to_do(self, before: dict[str, Any]) -> bool:
        open_still = any(arm["not_begun"] or any(run["ended"] == "out of time" for run in arm["runs"])
                         for arm in before["arms"].values())  # fmt: skip
        return self.budget.seconds > before["budget"]["seconds"] and open_still

    def _probe(self, one: Candidate) -> dict[str, float]:
        """What a run of this arm takes: by two steps and an evaluation; another rank of an arm is not asked again."""
        known = next((self.probes[other.name] for other in self.chosen
                      if other.of == one.of and other.name in self.probes), None)  # fmt: skip
        return known or self._run(one, one.rates[0], 2, [2]).seconds

    def _run(self, one: Candidate, rate: float, steps: int, marks: list[int], **more: Any) -> ShortRun:
        from peft_recipes.search.short_runs import short_run
        from peft_recipes.tasks.method_mixin import fit_schedules

        arm = dataclasses.replace(one.arm, learning_rate=rate)
        short = dataclasses.replace(self.recipe, arms={one.name: arm}, embedded={})
        arm = fit_schedules(short, steps)[0].arms[one.name]
        return short_run(self.task, self.prepared, arm, one.name, steps, marks, self.hardware, seed=self.seed, **more)

    def _next(self, arm: _Arm) -> None:
        """The arm's next rate, where one waits and a whole run of it fits into what is left of the budget."""
        if run_seconds(arm.figures, self.steps) > self.budget.left:
            return
        trial = next_trial(arm.study, arm.candidate)
        if trial is None:
            return
        made = self._run(
            arm.candidate, trial.params["learning_rate"], self.steps, marks_of(self.steps),
            judge=lambda so_far: goes_on(trial, so_far), deadline=self.budget.deadline,
        )  # fmt: skip
        tell(arm.study, trial, made)
        if made.seconds["step"]:
            arm.figures |= {key: max(arm.figures[key], made.seconds[key]) for key in ("load", "step", "evaluate")}
        self._keep(unfinished=True)
        done = sum(len(told(other.study)) for other in self.arms.values())
        self.on_trial(arm.candidate.name, plain_run(made), done, sum(len(one.rates) for one in self.chosen))

    def _keep(self, *, unfinished: bool) -> dict[str, Any]:
        """scan.json as things stand."""
        from peft_recipes.hardware.environment import environment

        data = {
            "schema": 1,
            "signature": self.signature,
            "unfinished": unfinished,
            "recipe": self.recipe.name,
            "title": self.recipe.title,
            "embedded": self.recipe.uses_stand_ins,
            "model": self.recipe.model,
            "dataset": self.recipe.dataset.path,
            "split": "validation",
            "judged_by": "loss",
            "rows": self.prepared.rows,
            "seed": self.seed,
            "steps": self.steps,
            "recipe_steps": self.most,
            "looks": marks_of(self.steps) if self.steps else [],
            "budget": {"seconds": self.budget.seconds, "spent_seconds": round(self.budget.spent, 2)},
            "probes": self.probes,
            "arms": {name: arm_data(arm.candidate, arm.study) for name, arm in self.arms.items()},
            "notes": self.notes,
            "environment": environment(self.hardware),
        }
        write_json(self.folder / FILE, data)
        return data

    def done(self) -> Scan:
        """scan.json as it stays, the winners' recipe and the plot."""
        from peft_recipes.reporting.scan_report import write_scan_plots

        if self.before is not None:
            return Scan(self.before, self.folder)
        data = self._keep(unfinished=False)
        found = {name: (self.arms[name].candidate, arm["best"]) for name, arm in data["arms"].items()
                 if arm["best"] is not None}  # fmt: skip
        winners = with_rates(self.recipe, found)
        told = ", ".join(found) or "no arm"
        text = f"# The learning rates of {told} come from a scan: {FILE} beside this file.\n{winners.to_yaml()}"
        write_text(self.folder / WINNERS, text)
        write_scan_plots(data, self.folder)
        return Scan(data, self.folder)


def _read(path: Path) -> dict[str, Any] | None:
    """The scan.json of an earlier call. Raises RecipeError where it can't be read."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != 1:
            raise ValueError(f"schema {data['schema']} is not known to this version")
        return data
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RecipeError(f"{path} can't be read: {error}. Replace it with --overwrite.") from error
