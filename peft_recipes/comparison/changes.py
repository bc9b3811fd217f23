"""changes.json: the arms that were stopped and added while a comparison ran, which its next call goes on with."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.comparison.orders import Job
from peft_recipes.errors import RecipeError, within
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.lock import is_locked, locked
from peft_recipes.runs.progress import read_progress

CHANGES_FILE = "changes.json"
HAND, DROP = "hand", "drop"  # who stopped an arm: the user, or the rule of `--drop`


@dataclass
class Changes:
    """The content of changes.json.

    stopped: arm, by ("hand" or "drop"), seed, step, of (the steps of a run), reason, at. added: arm, of (the arm that
    it is a variant of), changes (KEY: VALUE), definition (the arm as in a recipe), at. kept: the arms that were taken
    up again, which `--drop` leaves alone.
    """

    folder: Path
    stopped: list[dict[str, Any]] = field(default_factory=list)
    added: list[dict[str, Any]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def begin(self, overwrite: bool) -> None:
        """Begin with these changes, once the folder is locked. Raises RecipeError where another process changed them.

        overwrite: forget those of earlier calls.
        """
        if not overwrite and read_changes(self.folder) != self:
            raise RecipeError(
                f"{self.folder / CHANGES_FILE} was changed by the comparison that this call waited for. Call it again: "
                "it goes on with those arms."
            )
        self.store()

    def store(self) -> None:
        """Write the file; delete it where nothing is changed."""
        path = self.folder / CHANGES_FILE
        if self.stopped or self.added or self.kept:
            write_json(path, {"schema": 1, "stopped": self.stopped, "added": self.added, "kept": self.kept})
        else:
            path.unlink(missing_ok=True)

    def stop(self, arm: str, by: str, seed: int, step: int, of: int, reason: str = "") -> dict[str, Any]:
        """Record that an arm was stopped: at a step of a seed; 0 where it had not begun."""
        entry = {"arm": arm, "by": by, "seed": seed, "step": step, "of": of, "reason": reason, "at": _now()}
        self.stopped = [*(each for each in self.stopped if each["arm"] != arm), entry]
        self.store()
        return entry

    def take_up(self, arm: str) -> None:
        """Forget that an arm was stopped, and keep it from now on."""
        self.stopped = [each for each in self.stopped if each["arm"] != arm]
        self.kept = list(dict.fromkeys([*self.kept, arm]))
        self.store()

    def add(self, arm: str, of: str, changes: dict[str, Any], definition: dict[str, Any]) -> None:
        """Record an arm that was added."""
        self.added.append({"arm": arm, "of": of, "changes": changes, "definition": definition, "at": _now()})
        self.store()

    def stop_of(self, arm: str) -> dict[str, Any] | None:
        """How an arm was stopped; None for one that was not."""
        return next((each for each in self.stopped if each["arm"] == arm), None)

    @property
    def states(self) -> dict[str, str]:
        """The stopped arms, each with the state of its runs: stopped or dropped."""
        return {each["arm"]: "dropped" if each["by"] == DROP else "stopped" for each in self.stopped}

    def halted(self, jobs: Iterable[Job]) -> dict[Job, dict[str, Any]]:
        """Of these unfinished runs those whose arm was stopped: state, reason, and where it was ended step and of."""
        halted = {}
        for job in jobs:
            if entry := self.stop_of(job[0]):
                where = {"step": entry["step"], "of": entry["of"]} if entry["seed"] == job[1] else {}
                halted[job] = {"state": self.states[job[0]], "reason": entry["reason"], **where}
                progress = read_progress(self.folder / job[0] / f"seed-{job[1]}") or {}
                halted[job]["validation"] = progress.get("validation") or []
        return halted

    def with_added(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the added arms that it lacks. Raises RecipeError for one that is no arm."""
        with within(str(self.folder / CHANGES_FILE)):
            arms = {
                each["arm"]: Arm.from_dict(each["definition"], f"added arm '{each['arm']}'")
                for each in self.added
                if each["arm"] not in recipe.arms
            }
            return recipe.with_changes({"arms": {name: arm.to_dict() for name, arm in arms.items()}})

    def names(self, asked: Sequence[str] | None) -> list[str] | None:
        """The names of the arms that are asked for, and of the added ones; None for all of a recipe."""
        return None if asked is None else list(dict.fromkeys([*asked, *(each["arm"] for each in self.added)]))

    def notes(self, added: Collection[str], stopped: Collection[str]) -> list[str]:
        """A sentence for each of these arms that was added or stopped, for the readers of the comparison."""
        notes = [
            f"Arm '{each['arm']}' was added while the comparison ran: '{each['of']}' with {_listed(each['changes'])}."
            for each in self.added
            if each["arm"] in added
        ]
        for entry in self.stopped:
            if entry["arm"] in stopped:
                reason = f": {entry['reason']}" if entry["reason"] else ""
                notes.append(f"Arm '{entry['arm']}' was {ended_words(entry)}{reason}.")
        return notes


def read_changes(folder: Path) -> Changes:
    """Read the changes of a comparison's folder; none without a file. Raises RecipeError for a broken one."""
    path = folder / CHANGES_FILE
    if not path.is_file():
        return Changes(folder)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stopped, added, kept = data["stopped"], data["added"], list(data.get("kept", []))
        for entries, keys in ((stopped, ("arm", "by", "seed", "step", "of")), (added, ("arm", "of", "definition"))):
            if missing := [key for entry in entries for key in keys if key not in entry]:
                raise ValueError(f"an entry lacks '{missing[0]}'")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RecipeError(
            f"{path} can't be read ({error}). Restore it; or delete it, and no arm is stopped or added."
        ) from None
    stopped = [{"reason": "", **entry} for entry in stopped]
    return Changes(folder, stopped, [{"changes": {}, **entry} for entry in added], kept)


def take_up_later(folder: Path, arm: str) -> str | None:
    """Take a stopped arm up again where no comparison runs, for the next call; return what to say of it.

    None where a comparison runs, or the arm was not stopped in this folder.
    """
    if not (folder / CHANGES_FILE).is_file() or is_locked(folder):
        return None
    with locked(folder):
        changes = read_changes(folder)
        if changes.stop_of(arm) is None:
            return None
        changes.take_up(arm)
    return f"{arm} is taken up again: the same command of `compare` goes on with it, from its last checkpoint."


def ended_words(entry: dict[str, Any]) -> str:
    """Return "stopped by hand at step 40 of 125 of seed 1", or "dropped at step ..."."""
    verb = "dropped" if entry["by"] == DROP else "stopped by hand"
    if not entry["step"]:
        return f"{verb} before seed {entry['seed']}"
    return f"{verb} at step {entry['step']:,} of {entry['of']:,} of seed {entry['seed']}"


def _listed(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items()) or "no change"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
