"""A comparison whose runs are still being trained, in words: how far it is, what is still to come, unfinished arms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_recipes.reporting import facts
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.runs.folder import BASE, TO_COME, UNFINISHED

SO_FAR = "So far: "
_STATES = {"ok": "finished", "kept": "finished", "pending": "to come", "out-of-memory": "out of memory"}
MOST_NAMED = 12  # runs that are still to come


def entry(comparison: Comparison) -> dict[str, Any]:
    """Return `provisional` of comparison.json; empty for a finished comparison."""
    return comparison.get("provisional") or {}


def is_open(comparison: Comparison, name: str) -> bool:
    """Return whether an arm's verdict may still change: the comparison is provisional and no look has decided it."""
    return bool(entry(comparison)) and facts.decided_after(comparison, name) is None


def so_far(comparison: Comparison, name: str) -> str:
    """Return the words that a sentence about an arm begins with: none for one that does not change any more."""
    return SO_FAR if is_open(comparison, name) else ""


def banner(comparison: Comparison) -> str:
    """Return "Provisional: 5 of 12 runs finished, about 4 min left."; empty for a finished comparison."""
    made = entry(comparison)
    if not made:
        return ""
    done, of = made.get("finished") or 0, made.get("of") or 0
    most = " at most" if comparison.get("design") else ""
    if made.get("interrupted"):
        return f"Provisional: interrupted with {done} of {of} runs{most} finished. The same command continues."
    if done >= of:
        return f"Provisional: all {of} runs finished; the adapters are checked and the report is written next."
    left = duration(made.get("expected_seconds"))
    return f"Provisional: {done} of {of} runs{most} finished{f', {left} left{most}' if left else ''}."


def details(comparison: Comparison) -> list[str]:
    """Return what a reader of a provisional comparison should know: when it was written, and what is to come."""
    made = entry(comparison)
    if not made:
        return []
    lines = [f"Still to come: {text}." for text in [to_come(comparison)] if text]
    when = f"Written at {_clock(made.get('written_at'))}"
    if made.get("expected_end"):
        when += f"; the last run is expected to end at about {_clock(made['expected_end'])}"
    return [*lines, f"{when}. Figures and intervals change with each run, and the final table replaces these."]


def to_come(comparison: Comparison) -> str:
    """Return the runs that are still to come by arm: "LoRA r=8 (seeds 1 and 2) and IA3 (seed 2)"."""
    by_arm: dict[str, list[str]] = {}
    for run in entry(comparison).get("runs") or []:
        if run.get("state") in TO_COME:
            by_arm.setdefault(run.get("arm"), []).append(str(run.get("seed")))
    if comparison.get("design") and sum(map(len, by_arm.values())) > MOST_NAMED:
        return "seeds of the arms that are not decided"
    parts = [
        "the untuned base" if arm == BASE
        else f"{facts.label(comparison, arm)} (seed{'s' * (len(seeds) > 1)} {fmt.listed(seeds)})"
        for arm, seeds in by_arm.items()
    ]  # fmt: skip
    if len(parts) > MOST_NAMED:
        parts = [*parts[:MOST_NAMED], f"{len(parts) - MOST_NAMED} more arms"]
    return fmt.listed(parts)


@dataclass(frozen=True)
class Grid:
    """The runs by arm and seed. lines: (label of the arm, a (state, words) for each seed, None where no run is)."""

    seeds: list[str]
    lines: list[tuple[str, list[tuple[str, str] | None]]]


def grid(comparison: Comparison) -> Grid | None:
    """Return the state of every run, the base's left out; None for a finished comparison."""
    runs = [run for run in entry(comparison).get("runs") or [] if run.get("arm") != BASE]
    if not runs:
        return None
    seeds = list(dict.fromkeys(run.get("seed") for run in runs))
    by_job = {(run.get("arm"), run.get("seed")): run for run in runs}
    lines = []
    for arm in dict.fromkeys(run.get("arm") for run in runs):
        cells = [by_job.get((arm, seed)) for seed in seeds]
        lines.append((facts.label(comparison, arm), [cell and _cell(cell) for cell in cells]))
    return Grid([str(seed) for seed in seeds], lines)


def _cell(run: dict[str, Any]) -> tuple[str, str]:
    state = str(run.get("state"))
    words = _STATES.get(state, state)
    if state in ("running", "paused", "dropped", "stopped") and run.get("step") and run.get("of"):
        words += f", {fmt.count(run['step'])} of {fmt.count(run['of'])}"
    return {"kept": "ok"}.get(state, state), words


def is_unfinished(arm: dict) -> bool:
    """Return whether an arm has no finished run and has not failed: it is still to come, or was ended early."""
    return arm.get("status") in UNFINISHED


def unfinished(comparison: Comparison, arm: dict) -> str:
    """Return the state of an arm without a finished run: "running, step 40 of 125, validation accuracy 83.1 %"."""
    progress = arm.get("progress") or {}
    state = progress.get("state") or arm.get("status") or "pending"
    words = [{"pending": "not begun", "dropped": "dropped", "stopped": "stopped by hand"}.get(state, state)]
    if progress.get("step") and progress.get("of"):
        words[0] = "not finished" if state == "pending" else words[0]
        words.append(f"step {fmt.count(progress['step'])} of {fmt.count(progress['of'])}")
    if progress.get("validation"):
        metric = facts.selection_metric(comparison)
        words.append(f"validation {fmt.metric_title(metric)} {fmt.quality(progress['validation'][-1][1], metric)}")
    reason = facts.error_line(progress.get("reason")).rstrip(".")
    return ", ".join(words) + (f": {reason}" if reason else "")


def duration(seconds: Any) -> str:
    """Return a time left, rounded: "about 4 min", "less than a minute"; empty where it is not known."""
    seconds = facts.number(seconds)
    if seconds is None:
        return ""
    if seconds < 50:
        return "less than a minute"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    return f"about {minutes / 60:.1f} h" if minutes < 48 * 60 else f"about {minutes / 1440:.1f} days"


def _clock(text: Any) -> str:
    """Return "2026-11-26 14:03 UTC" of an ISO time."""
    text = facts.plain(text or "?")
    return f"{text[:16].replace('T', ' ')} UTC" if len(text) >= 16 else text
