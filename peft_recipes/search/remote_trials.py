"""The short runs of a scan on the nodes of a Ray cluster: the arms at the same time, one learning rate of each.

Whether halving stops a run depends on the arm's earlier runs, so those of one arm follow one another, as they do
without a cluster, and end the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft_recipes.cluster.nodes import RayNodes
from peft_recipes.cluster.pool import Pool
from peft_recipes.cluster.work import Work
from peft_recipes.comparison.needed_files import needed_files
from peft_recipes.errors import RecipeError
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.search.candidates import Candidate, with_learning_rates

_FOLDER, _FILE = ".trials", "trial.json"


class RemoteTrials:
    """Runs trials on a cluster. Used in a `with` block; leaving it by an error ends them."""

    def __init__(self, address: str | None):
        self._nodes, self._stack = RayNodes(address), ExitStack()
        self._trials: dict[int, tuple[Work, Candidate, float]] = {}

    def __enter__(self) -> RemoteTrials:
        self._stack.enter_context(self._nodes)
        self._pool = self._stack.enter_context(Pool(self._nodes))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def at_a_time(self, recipe: Recipe) -> int:
        """How many trials the cluster runs at a time."""
        return self._nodes.capacity(**self._resources(recipe))

    def submit(
        self,
        recipe: Recipe,
        candidate: Candidate,
        learning_rate: float,
        folder: Path,
        *,
        seed: int,
        steps: int,
        evaluate_after: Sequence[int],
        others: Sequence[dict[str, Any]],
        seconds: float,
    ) -> None:
        """Start a trial. folder: the scan's. seconds: left of its budget. others: the arm's entries of scan.json."""
        base = folder.absolute()
        trial = base / _FOLDER / f"{candidate.name}-{learning_rate:g}-{steps}"
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        yaml, options = trial.with_suffix(".recipe.yaml"), trial.with_suffix(".options.json")
        recipe = with_learning_rates(recipe, {candidate.name: (candidate, learning_rate)})
        recipe.to_yaml(yaml)
        write_json(options, {
            "arm": candidate.name, "learning_rate": learning_rate, "seed": seed, "steps": steps,
            "evaluate_after": list(evaluate_after), "others": list(others), "seconds": seconds,
        })  # fmt: skip
        resources = self._resources(recipe)
        work = Work(
            name=f"{recipe.name} {candidate.name} at {learning_rate:g}",
            module="peft_recipes.search.trial_worker",
            arguments=(yaml, options, trial / _FILE),
            base=base,
            folder=trial,
            inputs=(yaml, options),
            needed=needed_files(recipe, with_data=True),
            environment={"OMP_NUM_THREADS": str(resources["cpus"])},
            result=_FILE,
            **resources,
        )
        self._trials[id(work)] = work, candidate, learning_rate
        self._pool.submit(work)

    def finished(self) -> Iterator[tuple[Candidate, float, dict[str, Any]]]:
        """Yield each trial with its entry of scan.json as it ends. Raises RecipeError for one that failed."""
        for work, outcome in filter(None, self._pool.finished()):
            _, candidate, learning_rate = self._trials.pop(id(work))
            if outcome.code:
                raise RecipeError(f"{work.name} failed: {_reason(work)}")
            if outcome.code is None:
                raise RecipeError(f"{work.name}: {outcome.lost}")
            entry = json.loads((work.folder / _FILE).read_text(encoding="utf-8"))
            shutil.rmtree(work.folder)
            yield candidate, learning_rate, entry

    def clear(self, folder: Path) -> None:
        """Delete what the trials of a scan left in its folder."""
        shutil.rmtree(folder / _FOLDER, ignore_errors=True)

    def _resources(self, recipe: Recipe) -> dict[str, int]:
        import torch

        return self._nodes.resources(recipe.threads or torch.get_num_threads(), not recipe.training.get("use_cpu"))


def _reason(work: Work) -> str:
    lines = (work.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1][:300] if lines else 'no output'} (the whole log: {work.folder / 'log.txt'})"
