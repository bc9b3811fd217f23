"""`reproduce`: trains an adapter again from its recipe.yaml, and holds what comes out against its evidence."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError, unknown
from peft_recipes.runs.files import check_output
from peft_recipes.runs.folder import BASE, RUN_FILE, Run, read_run, run_folder

if TYPE_CHECKING:
    from peft_recipes.publishing.tolerance import Row
    from peft_recipes.recipe.recipe import Recipe

_PREDICTIONS = "predictions.parquet"
# What is fetched of a repository: the evidence, and not the weights, which are made anew.
_EVIDENCE = [RUN_FILE, "recipe.yaml", _PREDICTIONS]
_COUNTS = "training"  # what rows of counts are called, where others name their split


@dataclass
class Reproduction:
    """What came of it: a row a figure; `differs` names what of the machine is not as it was, nothing where all is.

    doubts: where the evidence itself is not whole, or contradicts itself. folder: of the new run; None where it was not
    kept.
    """

    adapter: str
    arm: str
    seed: int
    rows: list[Row]
    differs: list[str]
    doubts: list[str]
    folder: Path | None

    @property
    def held(self) -> bool:
        """Whether every figure that can be asked for came out as the evidence has it, and some metric could be."""
        asked = [row for row in self.rows if row.held is not None]
        return any(row.split != _COUNTS for row in asked) and all(row.held for row in asked) and not self.doubts

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        made = {**vars(self), "rows": [asdict(row) for row in self.rows], "folder": self.folder and str(self.folder)}
        return {**made, "same_conditions": not self.differs, "held": self.held}


def reproduce(
    adapter: str | Path,
    *,
    output: str | Path | None = None,
    changes: Iterable[str] = (),
    trust_remote_code: bool = False,
    quiet: bool = True,
) -> Reproduction:
    """Trains a run again, same arm and seed, and compares every metric with its run.json.

    adapter: the folder of a run, or its repository on the Hub, of which only the evidence is fetched. output: where the
    new run goes and stays; without it, it is thrown away. changes: "KEY=VALUE" for what lies elsewhere on this machine
    (model=..., dataset.path=...). Code of a repository runs only with trust_remote_code, whatever its recipe says.
    Raises RecipeError where there is no such run, or its recipe can't be run here.
    """
    folder = _fetched(adapter)
    run = _evidence(folder)
    recipe = _recipe(folder, run, list(changes), trust_remote_code)
    if output is not None:
        check_output(Path(output))
        again = _train(recipe, run, Path(output), folder, quiet)
        return _compared(str(adapter), run, again, recipe.task, keep=True)
    with tempfile.TemporaryDirectory(prefix="peft-recipes-") as place:
        again = _train(recipe, run, Path(place), folder, quiet)
        return _compared(str(adapter), run, again, recipe.task, keep=False)


def _fetched(adapter: str | Path) -> Path:
    """A folder with the evidence: the one named, or what the Hub has of it."""
    if Path(adapter).is_dir():
        return Path(adapter)
    from huggingface_hub import snapshot_download

    from peft_recipes.cards.metadata import is_repo_id
    from peft_recipes.models.bases import hub_errors

    name = str(adapter)
    if not is_repo_id(name) or "/" not in name or name.startswith((".", "/", "~")):
        raise RecipeError(f"{name} is no folder here and can't be a repository of the Hub (ORG/NAME).")
    with hub_errors("adapter", name):
        return Path(snapshot_download(name, allow_patterns=_EVIDENCE))


def _evidence(folder: Path) -> Run:
    """Its finished run. Raises RecipeError where the folder has none."""
    if (folder / "comparison.json").is_file() and not (folder / RUN_FILE).is_file():
        below = sorted(str(path.parent) for path in folder.glob(f"*/*/{RUN_FILE}"))
        raise RecipeError(f"{folder} is a comparison. Name one of its runs{f': {below[0]}, ...' if below else '.'}")
    run = read_run(folder)
    if run is None:
        raise RecipeError(f"{folder} has no {RUN_FILE}: there is no evidence that it could be held against.")
    if not run.ok:
        raise RecipeError(f"{folder / RUN_FILE}: the run is not a finished one ({run.data.get('status')}).")
    wrong = [key for key in ("arm", "seed", "metrics", "environment") if key not in run.data]
    if wrong:
        raise RecipeError(f"{folder / RUN_FILE} lacks '{wrong[0]}': it was not written by peft-recipes.")
    return run


def _recipe(folder: Path, run: Run, changes: list[str], trust_remote_code: bool) -> Recipe:
    """Its recipe as it runs here: with the evidence's threads where this machine has them."""
    from peft_recipes.catalog.changes import apply_changes
    from peft_recipes.runs.folder import resolved_recipe

    recipe = resolved_recipe(folder / "recipe.yaml")
    if run.data["arm"] not in (*recipe.arms, BASE):
        raise RecipeError(unknown("arm", run.data["arm"], recipe.arms, str(folder / "recipe.yaml")))
    threads, environment = None, run.data["environment"]
    if recipe.threads is None and environment.get("device") == "cpu":
        wanted = environment.get("threads")
        threads = wanted if isinstance(wanted, int) and 1 <= wanted <= (os.cpu_count() or 1) else None
    asked = {"trust_remote_code": trust_remote_code, **({"threads": threads} if threads else {})}
    recipe = recipe.with_changes(asked)
    return apply_changes(recipe, changes) if changes else recipe


def _train(recipe: Recipe, run: Run, output: Path, evidence: Path, quiet: bool) -> Run:
    from peft_recipes.training.run import train

    arm, seed = run.data["arm"], run.data["seed"]
    place = run_folder(output, recipe, arm, seed)
    if place.resolve() == evidence.resolve():
        raise RecipeError(f"--output {output}: the evidence itself lies there ({place}). Name another folder.")
    if (place / RUN_FILE).is_file():
        raise RecipeError(f"{place} holds a run already. Name another --output, or delete it.")
    return train(recipe, arm, seed=seed, output=output, resume=True, quiet=quiet)


def _compared(adapter: str, run: Run, again: Run, task: str, keep: bool) -> Reproduction:
    from peft_recipes.publishing.tolerance import Row, differing, rows

    differs = differing(run.data["environment"], again.data["environment"])
    predictions, doubts = _predictions(run, task)
    found = [*_counts(Row, run.data, again.data), *rows(run.metrics, again.metrics, predictions, task, not differs)]
    if predictions is None and differs:
        doubts.append(f"There is no {_PREDICTIONS}, and the conditions are others: nothing says how near is near.")
    folder = again.folder if keep else None
    return Reproduction(adapter, run.data["arm"], run.data["seed"], found, differs, doubts, folder)


def _predictions(run: Run, task: str) -> tuple[Any, list[str]]:
    """The evidence's results by example, and where they contradict its metrics: then one of the two was changed."""
    import pandas

    from peft_recipes.publishing.tolerance import scores

    path = run.folder / _PREDICTIONS
    if not path.is_file():
        return None, []
    try:
        table = pandas.read_parquet(path)
        found = scores(table[table["split"] == "test"], metric := run.data["metric"], task)
    except (OSError, ValueError, KeyError) as error:
        return None, [f"{path.name} can't be read: {' '.join(str(error).split())[:200]}."]
    said = run.metrics["test"].get(metric)
    if found is None or said is None:
        return table, []
    values, weights = found
    value = float((values * weights).sum() / weights.sum()) if weights is not None else float(values.mean())
    if abs(value - said) <= 1e-4 * max(1.0, abs(said)):
        return table, []
    return table, [f"{RUN_FILE} says {metric} {said:.6g}, its own {_PREDICTIONS} gives {value:.6g}."]


def _counts(row: Any, evidence: dict[str, Any], here: dict[str, Any]) -> list[Any]:
    """What must be equal on any machine."""
    found = []
    for name, path in (("steps", ("training", "steps")), ("trained parameters", ("parameters", "trainable"))):
        was, now = ((data.get(path[0]) or {}).get(path[1]) for data in (evidence, here))
        if was is not None:
            found.append(row(_COUNTS, name, was, now, (was, was), was == now))
    return found
