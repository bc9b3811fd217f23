"""`peft-recipes stop` and `add`, as the comparison's process does them between the events of its runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft_recipes.catalog.changes import with_variant
from peft_recipes.comparison.changes import HAND, Changes, ended_words
from peft_recipes.comparison.executors import Executor
from peft_recipes.comparison.judging import check_judged
from peft_recipes.comparison.requests import Inbox
from peft_recipes.comparison.schedule import Schedule
from peft_recipes.comparison.until_decided import Design
from peft_recipes.distributed.batches import check_shardable
from peft_recipes.distributed.launch import Launch
from peft_recipes.errors import RecipeError, unknown
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_text
from peft_recipes.runs.folder import BASE, read_run, run_folder
from peft_recipes.statistics.differences import FULL
from peft_recipes.training.resolve import memory_estimates, resolve

# Returns a recipe with its arm of this name resolved, the arm's estimated memory, and notes. Raises RecipeError.
Checked = Callable[[Recipe, str], tuple[Recipe, dict[str, Any], list[str]]]

_LAST = "after the runs that are planned"


@dataclass
class Team:
    """The arms of a comparison, of which `add` makes more. estimates: of memory, by arm. notes: on added arms."""

    recipe: Recipe
    names: list[str]
    seeds: Sequence[int]
    estimates: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)


class ByHand:
    """Takes the requests of a running comparison, one after another, and answers each in one line.

    checked: checks a recipe with one arm more, as `compare` does before the start. design: of seeds that are added
    until it is decided. yaml: the recipe that the runs read. on_added: called once the team has an arm more.
    """

    def __init__(
        self, team: Team, runs: Schedule, changes: Changes, inbox: Inbox, yaml: Path, checked: Checked,
        design: Design | None = None,
        on_added: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._team, self._runs, self._changes, self._inbox = team, runs, changes, inbox
        self._yaml, self._checked, self._design, self._on_added = yaml, checked, design, on_added

    def take_requests(self) -> None:
        """Do what was asked for since the last call. A request that can't be done is answered, and changes nothing."""
        for request in self._inbox.take():
            try:
                request.answer(self._do(request.data))
            except RecipeError as error:
                request.answer(problems=error.problems)
            except Exception as error:  # a comparison does not end because of a request
                logging.getLogger("peft_recipes").warning("A request failed: %r", error, exc_info=True)
                request.answer(problems=[f"{type(error).__name__}: {error}"])

    def _do(self, data: dict[str, Any]) -> str:
        if data.get("do") == "stop":
            return self._stop(data["arm"])
        if data.get("do") != "add":
            raise RecipeError(f"The comparison does not know the request '{data.get('do')}'.")
        if data["changes"]:
            return self._add(data["arm"], data["changes"], data.get("name"))
        return self._take_up(data["arm"], data.get("name"))

    # --- stop ---------------------------------------------------------------------------------------------------------

    def _stop(self, arm: str) -> str:
        self._check_name(arm)
        if entry := self._changes.stop_of(arm):
            raise RecipeError(f"{arm} is stopped already: it was {ended_words(entry)}.")
        if not self._is_open(arm):
            raise RecipeError(f"All runs of {arm} have ended: there is nothing to stop.")
        others = [name for name in self._team.names if name not in (FULL, *self._runs.stopped)]
        if arm == FULL and others:
            raise RecipeError(
                f"full can't be stopped: {_listed(others)} {'is' if len(others) == 1 else 'are'} compared with it, "
                "seed by seed. Stop them first, or end the comparison with Ctrl-C."
            )
        if self._runs.is_shared(arm):
            raise RecipeError(
                f"{arm} is trained in one process with others (--share-base), where it can't be stopped alone. Ask "
                "again once they have ended, or end the comparison with Ctrl-C."
            )
        ended = self._runs.stop(arm)
        if ended is None and self._design is None:
            self._runs.stopped.pop(arm, None)
            raise RecipeError(f"All runs of {arm} have just ended: there is nothing to stop.")
        finished = self._finished(arm)
        (_, seed), step, of = ended or ((arm, self._next_seed(finished)), 0, 0)
        self._changes.stop(arm, HAND, seed, step, of)
        where = f"at step {step:,} of {of:,} of seed {seed}" if step else f"before the first step of seed {seed}"
        stays = f"its finished seed{'s stay' if len(finished) > 1 else ' stays'}"
        return f"{arm} is stopped {where}; {stays if finished else 'no seed of it is finished'}."

    def _is_open(self, arm: str) -> bool:
        """Whether runs of an arm are still to be trained."""
        if self._design is None or self._runs.under_way(arm):
            return bool(self._runs.under_way(arm))
        return arm not in self._design.data.get("decided", ()) and arm not in self._design.data.get("given_up", ())

    def _next_seed(self, finished: Sequence[int]) -> int:
        return next((seed for seed in self._team.seeds if seed not in finished), self._team.seeds[-1])

    def _finished(self, arm: str) -> list[int]:
        """The seeds of an arm with a run that ended well."""
        output = self._yaml.parent.parent
        done = [seed for seed in self._team.seeds if (arm, seed) in self._runs.done]
        runs = {seed: read_run(run_folder(output, self._team.recipe, arm, seed)) for seed in done}
        return [seed for seed, run in runs.items() if run is not None and run.ok]

    # --- add ----------------------------------------------------------------------------------------------------------

    def _take_up(self, arm: str, name: str | None) -> str:
        self._check_name(arm)
        if name is not None:
            raise RecipeError(f"--as {name} names a variant of {arm}: say what differs: --set learning_rate=1e-3.")
        entry = self._changes.stop_of(arm)
        if entry is None:
            raise RecipeError(
                f"{arm} is an arm of the comparison already, and not stopped. To add a variant of it, say what "
                "differs: --set learning_rate=1e-3."
            )
        if self._design is not None:
            self._changes.take_up(arm)
            return f"{arm} is taken up again by the next call: with --until-decided it got no more seeds in this one."
        self._runs.extend([(arm, seed) for seed in self._team.seeds])
        self._changes.take_up(arm)
        if not self._runs.under_way(arm):
            return f"{arm} is not stopped any more; all its seeds are finished."
        where = f"goes on from step {entry['step']:,} of {entry['of']:,} of seed {entry['seed']}"
        return f"{arm} {where if entry['step'] else f'will be trained with {self._seeds(arm)}'}, {_LAST}."

    def _add(self, arm: str, changes: list[str], name: str | None) -> str:
        if self._design is not None:
            raise RecipeError(
                "With --until-decided no arm is added: the plan of seeds, and how often it may be wrong, were fixed "
                "before the first run. Add it to the recipe, and compare in another folder: --output ANOTHER."
            )
        self._check_name(arm)
        name, team = name or variant_name(arm, changes), self._team
        problems = self._name_problems(name)
        try:
            made = with_variant(team.recipe, arm, name, changes)
        except RecipeError as error:
            raise RecipeError(*problems, *(p for p in error.problems if p not in problems)) from None
        if problems:
            raise RecipeError(*problems)
        recipe, estimate, notes = self._checked(made, name)
        self._check_differs(recipe, arm, name, changes)
        before, team.recipe, team.estimates[name] = team.recipe, recipe, estimate
        self._write(recipe)
        try:
            self._runs.extend([(name, seed) for seed in team.seeds])
        except RecipeError:  # no node of the cluster has room for it
            self._runs.withdraw(name)
            team.recipe = before
            del team.estimates[name]
            self._write(before)
            raise
        team.names, team.notes = [*team.names, name], [*team.notes, *notes]
        self._on_added()
        self._changes.add(name, arm, dict(_pair(arm, change) for change in changes), recipe.arms[name].to_dict())
        return f"{name} will be trained with {self._seeds(name)}, {_LAST}."

    def _write(self, recipe: Recipe) -> None:
        """Replace the recipe's file at once: a run that starts may be reading it."""
        write_text(self._yaml, recipe.to_yaml())

    def _seeds(self, arm: str) -> str:
        seeds = [seed for _, seed in self._runs.under_way(arm)] or list(self._team.seeds)
        return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"

    def _name_problems(self, name: str) -> list[str]:
        if name in self._team.recipe.arms:
            return [f"There is an arm '{name}' already: name the new one with --as."]
        folder = self._yaml.parent / name
        runs = folder.is_dir() and all(path.name.startswith("seed-") for path in folder.iterdir())
        if folder.exists() and not runs:
            return [f"{folder} is there already, and no folder of runs: name the new arm with --as."]
        return []

    def _check_differs(self, recipe: Recipe, arm: str, name: str, changes: Iterable[str]) -> None:
        new = recipe.arms[name].to_dict()
        if new == recipe.arms[arm].to_dict():
            raise RecipeError(f"{', '.join(f'--set {change}' for change in changes)} changes nothing: {arm} has it so.")
        for other in self._team.names:
            if recipe.arms[other].to_dict() == new:
                raise RecipeError(f"The new arm would be the same as {other}, which the comparison has.")

    def _check_name(self, arm: str) -> None:
        if arm == BASE:
            raise RecipeError("The base is not trained: it is evaluated once, so it can't be stopped or changed.")
        if arm not in self._team.names:
            raise RecipeError(unknown("arm", arm, self._team.names, "the comparison"))


def check_added(
    executor: Executor, launch: Launch | None, folder: Path, data: Path | None, recipe: Recipe, arm: str
) -> tuple[Recipe, dict[str, Any], list[str]]:
    """Check an arm that is added while the comparison runs; return the recipe with it, its memory, and notes on it.

    folder: of the comparison; data: its prepared data. Raises RecipeError, as `compare` does before the start.
    """
    check_judged(recipe, recipe.arms)
    if launch is not None:
        check_shardable(recipe, arm, launch.distributed_type_of(recipe.arms[arm]))
    resolved = resolve(recipe, [arm], earlier=folder, data=data)
    estimates = memory_estimates(resolved, [arm], lambda each: executor.spread_of(each, resolved.hardware))
    added = replace(recipe, arms={**recipe.arms, arm: resolved.recipe.arms[arm]})
    return added, estimates[arm], [note for note in resolved.prepared.notes if f"'{arm}'" in note]


def variant_name(arm: str, changes: Iterable[str]) -> str:
    """Name a variant by what differs: lora with peft.r=32 is "lora-r32"."""
    parts = []
    for change in changes:
        key, _, value = change.partition("=")
        key = key.strip().rpartition(".")[2]
        short = {"learning_rate": "lr"}.get(key, key)
        parts.append(re.sub(r"[^A-Za-z0-9_-]+", "_", f"{short}{value.strip()}").strip("_"))
    return "-".join([arm, *parts])[:80]


def _pair(arm: str, change: str) -> tuple[str, str]:
    key, _, value = change.partition("=")
    return key.strip().removeprefix(f"arms.{arm}."), value.strip()


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
