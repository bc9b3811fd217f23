"""The table of a comparison that is still trained: comparison.json, .html and .md, written anew as its runs end.

They are marked as provisional, and the final ones replace them. Writing takes at most a tenth of the comparison's time
so far; the first table is always written. It happens between two runs, so that it disturbs no run's times. Where
several are trained at once it can't, and takes less: a fiftieth.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_recipes.comparison.live import Live
from peft_recipes.comparison.orders import Job, Order
from peft_recipes.comparison.until_decided import Design
from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import BASE, GIVEN_UP, TO_COME, Run, not_planned, unfinished

SHARE, SHARE_BESIDE = 0.1, 0.02  # of the time so far: between the runs; beside runs that are being trained
COMPARISON_FILE = "comparison.json"


class Provisional:
    """Writes the table so far of one call of `compare`, in a `with` block around its runs.

    jobs: returns the runs that are planned. complete: adds to the data what the final one has, too (notes, the call).
    halted: returns the state of those of some runs whose arm was stopped.
    design: of seeds that are added until it is decided; a verdict is then shown only where a look made it. If the block
    is left by an error or an interruption, the last table says so.
    """

    def __init__(
        self,
        live: Live,
        recipe: Recipe,
        arms: Sequence[str],
        folder: Path,
        jobs: Callable[[], Sequence[Job]],
        complete: Callable[[dict[str, Any]], None] = lambda data: None,
        halted: Callable[[Iterable[Job]], dict[Job, dict[str, Any]]] = lambda jobs: {},
        *,
        design: Design | None = None,
        at_once: int = 1,
        began: float | None = None,
    ):
        self._live, self._recipe, self._arms, self._folder, self._jobs = live, recipe, list(arms), folder, jobs
        self._complete, self._halted, self._design, self._at_once = complete, halted, design, at_once
        share = SHARE if at_once == 1 else SHARE_BESIDE
        self._allowance = Allowance(share, time.monotonic() if began is None else began)
        self._due = self._told = self._final = False
        self._data: dict[str, Any] | None = None
        self._figures: list[Any] = []

    def __enter__(self) -> Provisional:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and self._live.begun and not self._final:
            with self._suppressed():
                self._write_last()

    def grow(self, team: Any) -> None:
        """Take in an arm that was added. team: the recipe and the names of its arms (by_hand.py)."""
        self._recipe, self._arms = team.recipe, list(team.names)
        self._live.grow(team.recipe)

    def ended(self, order: Order | None) -> None:
        """Write the table if a run has ended or paused since the last one and there is time (`on_event`)."""
        self._due = self._due or order is not None
        if self._due and (order is not None or self._at_once > 1):
            with self._suppressed():
                self._write()

    def finish(self) -> None:
        """Note that the final table is written, which an interruption must not replace."""
        self._final = True

    def page(self) -> bytes:
        """The page as of now: the last table, and how far the runs are."""
        with self._suppressed():
            from peft_recipes.reporting.html import render_html

            if self._data is None:
                self._data = self._collect()
            return render_html(self._now(), self._figures).encode()
        return b"<p>The table can't be shown.</p>"

    def _write(self) -> None:
        _import_reporting()  # the final report needs it as well: no cost of this table
        if not self._allowance.allows("table"):
            return
        with self._allowance.spending("table"):
            self._data = self._collect()
            write_json(self._folder / COMPARISON_FILE, self._data)
        self._due = False
        if self._allowance.allows("page"):
            with self._allowance.spending("page"):
                self._write_page(drawn=False)

    def _write_page(self, drawn: bool) -> None:
        """Write the page and the Markdown. drawn: with the figures that there are."""
        from peft_recipes.reporting.write import provisional_plots, write_pages

        if not drawn:
            self._figures = provisional_plots(self._data)
        write_pages(self._data, self._folder, self._figures)

    def _write_last(self) -> None:
        """Write that the comparison was interrupted, with all that has ended."""
        if self._due or self._data is None:
            self._data = self._collect()
        data = self._data = self._now()
        data["provisional"] |= {"expected_seconds": None, "expected_end": None, "interrupted": True}
        write_json(self._folder / COMPARISON_FILE, data)
        self._write_page(drawn=True)

    def _now(self) -> dict[str, Any]:
        """The data of the last table, with how far the runs are now."""
        from peft_recipes.statistics.results import progress_of

        arms = dict(self._data["arms"])
        for arm in (arm for arm, entry in arms.items() if entry.get("progress")):
            runs = [self._live.run((arm, seed)).data for seed in self._data["seeds"]]
            if to_come := [run for run in runs if run["status"] in TO_COME]:
                arms[arm] = arms[arm] | {"progress": progress_of(self._recipe, to_come)}
        return self._data | {"arms": arms, "provisional": self._live.provisional()}

    def _collect(self) -> dict[str, Any]:
        """The contents of comparison.json for the runs as they are now."""
        from peft_recipes.statistics.results import comparison_data

        design, jobs = self._design, set(self._jobs())
        seeds = list(dict.fromkeys(seed for _, seed in self._jobs()))
        if design is not None:
            seeds = [
                s for s in seeds if any(self._live.run((arm, s)).data["status"] != "pending" for arm in self._arms)
            ]
            seeds = seeds or design.plan.seeds[:1]
        runs = {(arm, seed): self._run((arm, seed), jobs) for arm in self._arms for seed in seeds}
        base = self._run(next(job for job in self._jobs() if job[0] == BASE), jobs)
        plan, compared = (None, None) if design is None else (design.plan, design.run_seeds)
        data = comparison_data(self._recipe, runs, base, self._arms, seeds, plan, compared)
        self._complete(data)
        if design is not None:
            empty = {"decided": {}, "given_up": [], "seeds_of": {}, "ended": None}  # before its first run
            data["design"] = empty | copy.deepcopy(design.data)
            data["differences"] = _as_decided(data["differences"], data["design"]["decided"])
        return data | {"provisional": self._live.provisional()}

    def _run(self, job: Job, planned: set[Job]) -> Run:
        if job not in planned and not self._live.has_ended(job):
            halted = self._halted([job]).get(job)  # its arm was stopped before this seed
            data = unfinished(*job, **halted) if halted else not_planned(*job)
            return Run(self._folder / job[0] / f"seed-{job[1]}", data)
        run = self._live.run(job)
        if run.data["status"] in GIVEN_UP:
            run.data |= {key: value for key, value in self._halted([job]).get(job, {}).items() if key != "state"}
        looked = self._design is not None and self._design.due(*job)
        if (
            run.ok and self._recipe.metric == PREFERENCE and not looked
        ):  # judged against another run of full, or not yet
            run.data["metrics"]["test"].pop(PREFERENCE, None)
        return run

    @contextlib.contextmanager
    def _suppressed(self) -> Iterator[None]:
        """Go on without a provisional table where it can't be made: it is never the reason that a comparison ends."""
        try:
            yield
        except Exception as error:
            if not self._told:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                logging.getLogger("peft_recipes").warning(f"The provisional table can't be written ({reason}).")
            self._told = True


class Allowance:
    """How much time may be spent: a share of what has passed since `began`. Of each kind, the first time is free."""

    def __init__(self, share: float, began: float, clock: Callable[[], float] = time.monotonic):
        self._share, self._began, self._clock = share, began, clock
        self._spent, self._last = 0.0, dict[str, float]()

    def allows(self, kind: str) -> bool:
        """Whether the next one, if it takes as long as the last of its kind, stays within the share."""
        if kind not in self._last:
            return True
        return self._spent + self._last[kind] <= self._share * (self._clock() - self._began)

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self._last[kind] = self._clock() - began
            self._spent += self._last[kind]


def _as_decided(differences: dict[str, Any], decided: dict[str, Any]) -> dict[str, Any]:
    """The differences of the last look: of an arm that it left open, the interval that holds for all arms together.

    The verdict of that interval is what the looks decide by, so an open arm has none.
    """
    shown = {}
    for arm, entry in differences.items():
        if arm not in decided:
            entry = entry | {"ci95": entry.get("ci95_simultaneous", entry["ci95"])}
            entry["verdict"] = entry.get("verdict_simultaneous", entry["verdict"])
            if entry["verdict"] != "not shown":
                continue  # given up after the look
        shown[arm] = entry
    return shown


def _import_reporting() -> None:
    for module in ("matplotlib.backends.backend_svg", "matplotlib.figure"):
        importlib.import_module(module)
    for module in ("reporting.html", "statistics.results"):
        importlib.import_module(f"peft_recipes.{module}")
