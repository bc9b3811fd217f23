"""Figures of the scored answers: which of them the model ended itself, how long they are, how many are empty.

They come from `metrics["test"]` of the arms and the base; a comparison without scored answers has none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_recipes.recipe.metrics import METRICS
from peft_recipes.recipe.options import LANGUAGE_TASKS, TASKS, TOKEN_TASKS
from peft_recipes.reporting import facts
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison

ENDED_ENOUGH, EMPTY_TOO_OFTEN = 0.9, 0.1  # shares of the answers; a line below the table says what is beyond them

# Metric of the test split -> title and meaning of its column.
FIGURES = {
    "ended": ("Ended answers", "share of the scored answers that the model ended itself; the others were cut at the "
              "limit on new tokens"),
    "answer_tokens": ("Answer length", "mean number of tokens of a scored answer"),
    "empty_answers": ("Empty answers", "share of the scored answers without any text"),
    "bits_per_byte": ("Bits per byte", "the test loss in bits per byte of text instead of per token, for models with "
                      "different tokenizers"),
    "loss": ("Test loss", "mean cross-entropy per labelled token of the test references"),
}  # fmt: skip
_SHOWN: dict[str, Callable[[Any], str]] = {"answer_tokens": lambda value: fmt.rate(value, " tokens")}


def figures(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Return the columns of a comparison's answers: metric -> (title, meaning). The loss beside scored answers only."""
    metric = facts.metric(comparison)
    by_answers = metric in METRICS and METRICS[metric].generated
    return {name: words for name, words in FIGURES.items() if name != metric and (by_answers or name != "loss")}


def measured(comparison: Comparison) -> list[str]:
    """Return the figures that the base or an arm has."""
    entries = [comparison.get("base") or {}, *facts.arms(comparison).values()]
    return [
        name
        for name in figures(comparison)
        if any(facts.split_value(entry, "test", name) is not None for entry in entries)
    ]


def shown(entry: dict[str, Any], name: str) -> str:
    """Return a figure of an arm or the base as text."""
    value = facts.split_value(entry, "test", name)
    return _SHOWN[name](value) if name in _SHOWN else fmt.quality(value, name)


def alarms(comparison: Comparison) -> list[str]:
    """Return a line for the base and each arm that often does not end its answers, or often gives none."""
    base = comparison.get("base") or {}
    named = [("The untuned base", base), *((facts.label(comparison, n), a) for n, a in facts.arms(comparison).items())]
    lines = []
    for label, entry in named:
        ended, empty = (facts.split_value(entry, "test", name) for name in ("ended", "empty_answers"))
        if ended is not None and ended < ENDED_ENOUGH:
            cut = _cut(comparison)
            if ended == 0:
                lines.append(f"{label} never ends an answer itself: all of them are cut at {cut}.")
            else:
                lines.append(f"{label} ends {fmt.percent(ended)} of its answers itself; the others are cut at {cut}.")
        if empty is not None and empty > EMPTY_TOO_OFTEN:
            lines.append(f"{label} leaves {fmt.percent(empty)} of its answers empty.")
    return lines


def _cut(comparison: Comparison) -> str:
    limit = facts.number(comparison.get("answers_cut_at"))
    return f"{fmt.count(limit)} tokens" if limit is not None else "the limit on new tokens"


def loss_alone(comparison: Comparison) -> str:
    """Return the caveat of a language model's comparison by its loss; empty for others."""
    task = comparison.get("task")
    if task not in TASKS or facts.metric(comparison) != "loss":
        return ""
    can_score = "rougeL" in TASKS[task].metrics
    how = ' (the option "metric: rougeL" does that)' if can_score else ""
    writes = can_score or (task in TOKEN_TASKS and task in LANGUAGE_TASKS)
    return f"Compared by the loss alone: no answers were scored{how}." if writes else ""
