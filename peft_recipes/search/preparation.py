"""What the short runs of a scan share: the prepared data without its test split, and checked candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.search.candidates import Candidate, with_learning_rates
from peft_recipes.search.trials import Trial

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.hardware.device import Hardware
    from peft_recipes.search.short_runs import ShortRun
    from peft_recipes.tasks.base import Task


@dataclass
class Preparation:
    """The data, the task and the candidates, fitted to the base, in one process. Call `prepare` first.

    notes: of the data and the targets. needs: estimated bytes of each candidate's run, by name.
    """

    recipe: Recipe
    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)
    needs: dict[str, int] = field(default_factory=dict)

    def prepare(self, *, checked: bool = False) -> None:
        """Prepare the data without its test split and check all candidates before the first run.

        checked: another process has checked them. Raises RecipeError.
        """
        from peft_recipes.arms.apply import fit_targets
        from peft_recipes.hardware.device import choose
        from peft_recipes.models import bases
        from peft_recipes.planning import memory
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
        for one in [] if checked else self.candidates:
            try:
                self.task.check_arguments(one.arm, self.hardware)
                needs = memory.memory(self.task, self.prepared, config, one.name)
                self.needs[one.name] = needs["total"]
                if not needs["fits"] and "memory" not in self.recipe.skip_checks:
                    problems.append(memory.too_large(one.name, needs, self.recipe))
            except RecipeError as error:
                problems += error.problems
        if problems:
            raise RecipeError(*problems)

    def load_base(self) -> None:
        """Load the base and drop it: pretraining of a stand-in and first imports are no part of a run's loading."""
        self.task.load_base(self.prepared)

    def train(self, trial: Trial, *, keep_training: Callable[[ShortRun], bool], deadline: float) -> ShortRun:
        """Do a trial in this process; keep_training, deadline: as in `short_run`."""
        from peft_recipes.search.short_runs import short_run
        from peft_recipes.tasks.method_mixin import fit_schedules

        name = trial.candidate.name
        candidate = next(one for one in self.candidates if one.name == name)
        arm = dataclasses.replace(candidate.arm, learning_rate=trial.learning_rate)
        recipe = fit_schedules(dataclasses.replace(self.recipe, arms={name: arm}, embedded={}), trial.steps)[0]
        return short_run(
            self.task, self.prepared, recipe.arms[name], name, trial.steps, trial.evaluate_after, self.hardware,
            seed=trial.seed, keep_training=keep_training, deadline=deadline,
        )  # fmt: skip
