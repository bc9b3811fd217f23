"""What the page shows of a comparison, of runs without one, and of adapters without figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_recipes.cards.redaction import portable, without_paths
from peft_recipes.gallery.collect import CARD, Found
from peft_recipes.gallery.points import Point, point
from peft_recipes.reporting import facts, rows, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.runs.folder import BASE, Run

BASE_ROW = "Untuned base"
_NO_POINT = Point(None, None, None, None, None, None)


@dataclass
class Line:
    """A row of an entry's table. `kind`: base, full, arm or failed (with a `reason`); cards: (seed, run's folder)."""

    label: str
    method: str
    kind: str
    cells: dict[str, rows.Cell] = field(default_factory=dict)
    reason: str = ""
    verdict: str = ""
    point: Point = _NO_POINT
    cards: list[tuple[str, Path]] = field(default_factory=list)


@dataclass
class Entry:
    """One comparison, several runs of one recipe, or an adapter. comparison: without paths of this machine."""

    folder: Path
    name: str
    title: str
    task: str
    base: str
    data: str
    facts: list[str]
    headline: str
    caveats: list[str]
    verdict: str
    lines: list[Line]
    embedded: bool = False
    metric: str = ""
    comparison: Comparison | None = None


def entries(found: Found) -> Iterable[Entry]:
    """Yield an entry for each thing found, comparisons first. What can't be shown goes to `found.left_out`."""
    made = [(folder / "comparison.json", lambda f=folder, d=data: of_comparison(found, f, d))
            for folder, data in found.comparisons]  # fmt: skip
    made += [(group[0].folder, lambda g=group: of_runs(found, g)) for group in _groups(found.runs)]
    made += [(folder, lambda f=folder, d=data: of_adapter(found, f, d)) for folder, data in found.adapters]
    for path, make in made:
        try:
            entry = make()
        except Exception as error:  # a file that is JSON, but not as peft-recipes writes it
            reason = f"can't be shown ({type(error).__name__}: {without_paths(str(error))[:160]})"
            found.left_out.append((found.name(path), reason))
        else:
            yield entry


def of_comparison(found: Found, folder: Path, data: Comparison) -> Entry:
    """Return the entry of a comparison: the headline arm's verdict, and a line for the base and each arm."""
    shown = portable(data)
    lead = sentences.headline_arm(shown)
    difference = sentences.describe_difference(shown, lead) if lead else None
    lines = []
    for row in rows.table(shown).rows:
        lines.append(_line(shown, row))
        lines[-1].cards = _cards(folder, BASE if row.kind == "base" else row.name, data)
    seeds, title = len(shown.get("seeds") or []), shown.get("title") or shown.get("recipe")
    about = [f"{seeds} seed{'s' * (seeds != 1)}"]
    about += [f"margin {difference.margin}"] if difference else []
    return Entry(
        folder, found.name(folder), facts.plain(title or folder.name), *_where(shown), about,
        sentences.verdict_headline(shown, lead) if lead else "No arm has been run yet.",
        sentences.caveats(shown, lead) if lead else [], difference.verdict if difference else "", lines,
        bool(shown.get("embedded")), _metric(shown), shown,
    )  # fmt: skip


def of_runs(found: Found, runs: list[Run]) -> Entry:
    """Return the entry of runs of one recipe that are in no comparison: means over seeds, and no verdict."""
    data, folder = portable(runs[0].data), runs[0].folder
    shown = _as_comparison(runs)
    lines = []
    for row in rows.table(shown).rows:
        line = _line(shown, row)
        own = [run for run in runs if run.data.get("arm") == (BASE if row.kind == "base" else row.name)]
        line.cards = [(str(run.data.get("seed")), run.folder) for run in own if (run.folder / CARD).is_file()]
        line.cells.pop("difference", None)  # not paired: figures of runs that may differ in data or code
        lines.append(line)
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    headline = f"{count} outside of a comparison. `peft-recipes compare` pairs arms by example and gives the verdict."
    title = facts.plain(data.get("recipe") or folder.name)
    parent = _parent(folder) if found.root in folder.parents[1:] else folder
    return Entry(
        parent, found.name(folder if len(runs) == 1 else parent), title, *_where(data), [count], headline, [], "",
        lines, bool(data.get("embedded")), _metric(shown),
    )  # fmt: skip


def of_adapter(found: Found, folder: Path, config: dict[str, Any]) -> Entry:
    """Return the entry of an adapter that another tool has saved: method, rank and base, no figures."""
    config = portable(config)
    title = facts.display_method(folder.name, {"method": config["peft_type"]})
    rank = f" r={config['r']}" if isinstance(config.get("r"), int) else ""
    line = Line(title + rank, title, "failed", reason="no figures: it was not trained by peft-recipes")
    if (folder / CARD).is_file():
        line.cards = [("", folder)]
    base = facts.plain(config.get("base_model_name_or_path") or "not named")
    headline = "An adapter without evidence. `peft-recipes evaluate` compares it with its base."
    return Entry(
        folder, found.name(folder), facts.plain(folder.name), _task(config), base, "", [], headline, [], "", [line]
    )


def _task(config: dict[str, Any]) -> str:
    return {"CAUSAL_LM": "language modeling", "SEQ_CLS": "text classification", "TOKEN_CLS": "token classification",
            "SEQ_2_SEQ_LM": "seq2seq"}.get(str(config.get("task_type")), "not named")  # fmt: skip


def _where(data: dict[str, Any]) -> tuple[str, str, str]:
    """Task, base and data as they are shown and filtered by."""
    task = facts.plain(data.get("task") or "not named").replace("-", " ")
    return task, facts.plain(data.get("model") or "not named"), facts.plain(data.get("dataset") or "")


def _metric(shown: Comparison) -> str:
    return f"Test {fmt.metric_title(facts.plain(facts.metric(shown)))}"


def _line(shown: Comparison, row: rows.Row) -> Line:
    if row.kind == "base":
        return Line(BASE_ROW, "", "base", row.cells)
    if row.name not in facts.arms(shown):  # the base failed
        return Line(BASE_ROW, "", "failed", reason=row.reason)
    arm = facts.arms(shown)[row.name]
    method = facts.display_method(row.name, arm)
    if row.kind in ("failed", "pending"):
        return Line(row.label, method, "failed", reason=row.reason)
    verdict = row.cells["verdict"].text
    kind = "full" if facts.is_full(row.name, arm) else "arm"
    cells = {key: cell for key, cell in row.cells.items() if cell.text != fmt.NOTHING and key != "verdict"}
    return Line(row.label, method, kind, cells, "", "" if verdict == fmt.NOTHING else verdict, point(shown, row.name))


def _cards(folder: Path, arm: str, data: Comparison) -> list[tuple[str, Path]]:
    """The folders of an arm's runs that have a card, by seed."""
    runs = [(str(seed), folder / arm / f"seed-{seed}") for seed in data.get("seeds") or []]
    return [(seed, run) for seed, run in runs if (run / CARD).is_file()]


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs of one recipe, with the same base, data and metric, in folders of one parent, by arm and seed."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        key = [_parent(run.folder), *(run.data.get(key) for key in ("recipe", "model", "dataset", "metric"))]
        groups.setdefault(tuple(map(str, key)), []).append(run)
    return list(groups.values())


def _parent(folder: Path) -> Path:
    """The folder that holds a run's arm: of adapters/RECIPE/ARM/seed-0 it is adapters/RECIPE."""
    return folder.parent.parent


def _as_comparison(runs: list[Run]) -> Comparison:
    """Runs as a comparison without differences, as input for the table."""
    first = portable(runs[0].data)
    metric, arms, base = first.get("metric") or "loss", {}, None
    for name in dict.fromkeys(str(run.data.get("arm")) for run in runs):
        own = [portable(run.data) for run in runs if str(run.data.get("arm")) == name]
        done = [data for data in own if data.get("status") == "ok"]
        if name == BASE:
            base = {"status": "ok", "metrics": (done or own)[0].get("metrics")}
            continue
        values = [facts.number(((data.get("metrics") or {}).get("test") or {}).get(metric)) for data in done]
        values = [value for value in values if value is not None]
        arms[name] = _figures((done or own)[0]) | {
            "metric": {"mean": statistics.fmean(values) if values else None, "values": values,
                       "sd": statistics.stdev(values) if len(values) > 1 else None},
        }  # fmt: skip
    return {"metric": metric, "task": first.get("task"), "arms": arms, "base": base, "seeds": []}


def _figures(data: dict[str, Any]) -> dict[str, Any]:
    """An arm's entry of comparison.json from a run.json."""
    parameters, training = data.get("parameters") or {}, data.get("training") or {}
    return {
        **{key: data.get(key) for key in ("status", "error", "method", "rank", "learning_rate", "checkpoint_bytes")},
        "trainable_parameters": parameters.get("trainable"), "total_parameters": parameters.get("total"),
        "training_seconds": training.get("seconds"), "peak_memory_bytes": training.get("peak_memory_bytes"),
    }  # fmt: skip
