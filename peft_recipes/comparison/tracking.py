"""Add to the tracker run of each run what only the comparison knows: its difference, verdict, card and report.

It also reports the runs that their trackers lack: kept from before the recipe named a tracker, or reported in part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from peft_recipes.cards.write import CARD
from peft_recipes.comparison.comparison import Comparison
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import BASE, RUN_FILE, Run, read_run, run_folder
from peft_recipes.trackers import choice, figures
from peft_recipes.trackers.session import OWN, Session, closing

REPORT = "comparison.html"


def report_comparison(comparison: Comparison, recipe: Recipe, arms: Iterable[str], seeds: Iterable[int]) -> list[str]:
    """Report the finished runs of a comparison; return a note for each tracker that failed.

    A tracker that fails once is not asked again. What a tracker run holds already is not added a second time.
    """
    names = [name for name in choice.requested(recipe.training) if name in OWN]
    seeds, output, notes = list(seeds), comparison.folder.parent, []
    for arm, seed in [(BASE, seeds[0]), *((arm, seed) for arm in arms for seed in seeds)]:
        run = read_run(run_folder(output, recipe, arm, seed))
        if run is None or not run.ok or not names:
            continue
        failed = _report(comparison, recipe, run, names)
        notes += failed.values()
        names = [name for name in names if name not in failed]
    return notes


def _report(comparison: Comparison, recipe: Recipe, run: Run, names: list[str]) -> dict[str, str]:
    """Report one run; return the notes of the trackers that failed, by name."""
    arm, seed = run.data["arm"], run.data["seed"]
    metrics, texts = _verdict(comparison, arm)
    stamp = hashlib.sha256(json.dumps([metrics, texts], sort_keys=True).encode()).hexdigest()[:16]
    places, failed = dict(run.data.get("trackers") or {}), {}
    config = figures.configuration(recipe.to_dict(), arm, seed)
    for name in names:
        place = places.get(name, {})
        if place.get("complete") and place.get("comparison") == stamp:
            continue
        session = Session([name], choice.identity(recipe.training, recipe.name, arm, seed), run.folder)
        with closing(session):
            session.open(config, {name: place} if place else {}, None if place.get("complete") else 0)
            if not place.get("complete"):
                _replay(session, run.data)
            files = [run.folder / CARD, comparison.folder / REPORT]
            session.add(metrics, texts, files, figures.last_step(run.data))
        if session.ended:
            places[name] = {**session.places[name], "complete": True, "comparison": stamp}
        elif session.places:
            places[name] = session.places[name]
        if session.notes:
            failed[name] = session.notes[0]
    if places != run.data.get("trackers", {}):
        write_json(run.folder / RUN_FILE, run.data | {"trackers": places})
    return failed


def _verdict(comparison: Comparison, arm: str) -> tuple[dict[str, float], dict[str, str]]:
    """The figures and the words of an arm's difference from the reference arm."""
    difference = comparison.data["differences"].get(arm)
    if difference is None:
        compared = comparison.data["differences"].values()
        role = "reference" if any(each["against"] == arm for each in compared) else "nothing to compare with"
        return {}, {"comparison/verdict": "untrained base" if arm == BASE else role}
    words = {"verdict": difference["verdict"], "against": difference["against"], "result": comparison.verdict(arm)}
    return figures.comparison_metrics(difference), {f"comparison/{key}": text for key, text in words.items()}


def _replay(session: Session, run: dict[str, Any]) -> None:
    """Report the losses and validations of a finished run, then its final figures."""
    training = run.get("training") or {}
    logs = [(step, {"loss": loss}) for step, loss in training.get("losses") or []]
    logs += [
        (point["step"], {f"eval_{name}": value for name, value in point.items() if name != "step"})
        for point in training.get("validation") or []
    ]
    for step, log in sorted(logs, key=lambda each: each[0]):
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        session.event("on_log", None, state, None, logs=log)
    session.add(figures.final_metrics(run), {}, [], figures.last_step(run))
