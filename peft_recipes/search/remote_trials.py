"""The short runs of a scan on the nodes of a Ray cluster: `Trials` (trials.py), each in a process of its own.

The arms are trained at the same time, one learning rate of each: whether halving stops a run depends on the arm's
earlier ones, so those of one arm follow one another, as they do without a cluster, and end the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from peft_recipes.cluster.nodes import RayNodes
from peft_recipes.cluster.pool import Pool
from peft_recipes.cluster.work import Outcome, Work
from peft_recipes.comparison.needed_files import needed_files
from peft_recipes.errors import RecipeError
from peft_recipes.runs.files import write_json
from peft_recipes.search.own_process import write_recipe
from peft_recipes.search.trials import FOLDER, Ended, Scanned, Trial, failed_entry

_FILE = "trial.json"


class RemoteTrials:
    """Runs trials on a cluster. Connect with `with`, then say with `begin` what they belong to."""

    note = "Trained on the nodes of a Ray cluster: the seconds are theirs, this environment is not."

    def __init__(self, address: str | None):
        self._nodes, self._stack = RayNodes(address), ExitStack()
        self._trials: dict[int, tuple[Work, Trial]] = {}
        self._unplaced: list[Ended] = []
        self._scanned: Any = None

    def __enter__(self) -> RemoteTrials:
        self._stack.enter_context(self._nodes)
        self._pool = self._stack.enter_context(Pool(self._nodes))
        return self

    def __exit__(self, kind: Any, *error: Any) -> bool | None:
        try:
            return self._stack.__exit__(kind, *error)
        finally:
            if self._scanned is not None and not (kind and issubclass(kind, RecipeError)):  # which names a log there
                shutil.rmtree(self._scanned.folder / FOLDER, ignore_errors=True)

    def begin(self, scanned: Scanned) -> None:
        """Say which scan the trials belong to."""
        self._scanned = scanned

    def at_a_time(self) -> int:
        return self._nodes.capacity(**self._resources())

    def submit(self, trial: Trial) -> None:
        budget = self._scanned.budget
        if budget.left <= trial.expected:
            self._unplaced.append((trial, None))
            return
        work = self._work(trial, budget.left)
        self._trials[id(work)] = work, trial
        self._pool.submit(work)

    def _work(self, trial: Trial, seconds: float) -> Work:
        base, recipe = self._scanned.folder.absolute(), self._scanned.recipe
        folder = base / FOLDER / f"{trial.candidate.name}-{trial.learning_rate:g}-{trial.steps}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yaml, options = folder.with_suffix(".recipe.yaml"), folder.with_suffix(".options.json")
        write_recipe(recipe, [trial.candidate], yaml)
        write_json(options, trial.options(seconds))
        resources = self._resources()
        return Work(
            name=f"{recipe.name} {trial.name}",
            module="peft_recipes.search.trial_worker",
            arguments=("one", yaml, options, folder / _FILE),
            base=base,
            folder=folder,
            inputs=(yaml, options),
            needed=needed_files(recipe, with_data=True),
            environment={"OMP_NUM_THREADS": str(resources["cpus"])},
            result=_FILE,
            **resources,
        )

    def finished(self) -> Iterator[Ended]:
        while self._trials or self._unplaced:
            while self._unplaced:
                yield self._unplaced.pop(0)
            for ended in self._pool.finished():
                if ended is not None:
                    work, outcome = ended
                    _, trial = self._trials.pop(id(work))
                    yield trial, _entry(work, outcome, trial)
                elif self._scanned.budget.is_overdue:
                    for work, trial in list(self._trials.values()):
                        self._pool.cancel(work)
                        del self._trials[id(work)]
                        self._unplaced.append((trial, None))

    def _resources(self) -> dict[str, int]:
        import torch

        recipe = self._scanned.recipe
        return self._nodes.resources(recipe.threads or torch.get_num_threads(), not recipe.training.get("use_cpu"))


def _entry(work: Work, outcome: Outcome, trial: Trial) -> dict[str, Any]:
    """The entry of scan.json of a trial that has ended. Raises RecipeError for a mistake in the recipe."""
    if outcome.code is None:
        return failed_entry(trial.learning_rate, outcome.lost)
    if outcome.code:
        lines = (work.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1][:300] if lines else f"no output, exit code {outcome.code}"
        if outcome.code == 2:
            raise RecipeError(f"{work.name} failed: {reason} (the whole log: {work.folder / 'log.txt'})")
        return failed_entry(trial.learning_rate, reason)
    entry = json.loads((work.folder / _FILE).read_text(encoding="utf-8"))
    shutil.rmtree(work.folder)
    return entry
