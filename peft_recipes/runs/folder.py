"""Run folders: their path, their run.json and recipe.yaml, and the signature that identifies a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError, within
from peft_recipes.guards.runner import failed_checks
from peft_recipes.hardware.environment import code_version
from peft_recipes.recipe.answer_options import source_hash
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import read_yaml
from peft_recipes.runs.files import check_output

BASE = "base"  # the untrained base in the place of an arm
# States of a run without figures that has not failed: still to come, or ended early on purpose.
TO_COME, GIVEN_UP = ("pending", "running", "paused"), ("dropped", "stopped")
UNFINISHED = (*TO_COME, *GIVEN_UP)
RUN_FILE = "run.json"
_TRACKING = ("report_to", "run_name", "project")  # training options that change no figure


@dataclass
class Run:
    """One finished run: its folder, and its run.json as `data`."""

    folder: Path
    data: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.data.get("status") == "ok"

    @property
    def failed_checks(self) -> dict[str, str]:
        """The checks that failed after training, each with its words; the figures are kept."""
        return failed_checks(self.data.get("checks"))

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """split -> metric -> value."""
        return self.data.get("metrics", {})

    def __repr__(self) -> str:
        scores = ", ".join(f"{k} {v:.4g}" for k, v in self.metrics.get("test", {}).items())
        return f"Run({self.folder}, {self.data.get('status')}{': ' + scores if scores else ''})"


def not_planned(arm: str, seed: int) -> dict[str, Any]:
    """The data of a run that its arm did not need: it was decided with fewer seeds than another one."""
    return {"status": "not planned", "error": None, "arm": arm, "seed": seed}


def unfinished(arm: str, seed: int, state: str, **progress: Any) -> dict[str, Any]:
    """The data of a run in one of the states `UNFINISHED`.

    progress: step, of, validation (of progress.json: a dict for each evaluation), reason (of one that was given up).
    """
    return {"status": state, "error": None, "arm": arm, "seed": seed, **progress}


def run_folder(output: Path, recipe: Recipe, arm: str, seed: int) -> Path:
    """`<output>/<recipe>/<arm>/seed-<n>`."""
    return output / recipe.name / arm / f"seed-{seed}"


def read_run(folder: Path) -> Run | None:
    """Read the run of a folder; None without a run.json. Raises RecipeError for a broken one."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or "status" not in data:
            raise ValueError("it has no 'status'")
        return Run(folder, data)
    except (ValueError, OSError) as error:
        raise RecipeError(f"{path} can't be read: {error}. Delete it to do the run again.") from error


def signature(recipe: Recipe, arm: str, seed: int, fingerprint: str) -> str:
    """A hash of all that determines a run's figures: of two runs with one signature, one need not be trained."""
    plain = recipe.to_dict()
    for key in ("title", "description", "margin", "embedded", "name", "checkpoint_seconds", "judge"):
        plain.pop(key)
    if not recipe.scores_answers:  # a run has all other metrics of its task
        plain.pop("metric")
    plain["training"] = {key: value for key, value in plain["training"].items() if key not in _TRACKING}
    if recipe.score is not None:
        plain["score"] = [recipe.score.rpartition(":")[2], source_hash(recipe.score) or recipe.score]
    if recipe.reward is not None:
        plain["reward"] = [recipe.reward.rpartition(":")[2], source_hash(recipe.reward) or recipe.reward]
    plain["arms"] = plain["arms"].get(arm)
    text = json.dumps([plain, arm, seed, fingerprint, code_version()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def read_comparison_file(folder: str | Path) -> dict[str, Any]:
    """Read a folder's comparison.json. Raises RecipeError where it is missing or broken."""
    path = Path(folder) / "comparison.json"
    if not path.is_file():
        below = sorted(p.parent for p in Path(folder).glob("*/comparison.json"))
        hint = f" There are some in: {', '.join(map(str, below))}." if below else " `peft-recipes compare` makes one."
        raise RecipeError(f"{folder} holds no comparison.json.{hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != 1 or not isinstance(data["arms"], dict):
            raise ValueError(f"schema {data['schema']} is not known to this version")
        if not isinstance(data.get("provisional", {}), dict):
            raise ValueError("its 'provisional' is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} can't be read: {error}.") from error
    return data


def resolved_recipe(path: Path) -> Recipe:
    """Read a run's recipe.yaml, which alone reproduces the run."""
    if not path.is_file():
        raise RecipeError(f"{path} is not there: the folder is not a run of peft-recipes.")
    with within(str(path)):
        return Recipe.from_dict(read_yaml(path))


def check_free(output: Path, folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise RecipeError where a run can't be written to its folder, or would replace one without --overwrite."""
    check_output(output)
    if folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        what = "an unfinished run"
        if (folder / RUN_FILE).is_file():
            run = read_run(folder)
            what = "a finished run" if run is None or run.ok else f"a failed run ({run.data.get('error')})"
        raise RecipeError(f"{folder} holds {what}. Go on from it with --resume, or replace it with --overwrite.")


def finished(folder: Path, signature: str) -> Run | None:
    """A folder's finished run, if any. Raises RecipeError where its recipe, data or code are others."""
    run = read_run(folder)
    if run is None or not run.ok:
        return None
    if run.data.get("signature") != signature:
        raise RecipeError(
            f"{folder} holds a finished run of another recipe, data or code. Replace it with --overwrite, or name "
            "another --output."
        )
    return run
