"""Where the arms differ: counts as sentences, and the examples for the reports.

Prompts, references and answers are untrusted text: the renderers escape them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison


@dataclass(frozen=True)
class Answer:
    """One arm's answer to an example: the arm's label, the answer and its score as text, "" where there is none."""

    label: str
    text: str
    score: str


@dataclass(frozen=True)
class Example:
    """A test example on which two arms differ. `title`: its id; `prompt` is empty where the text is not stored."""

    title: str
    prompt: str
    reference: str
    answers: list[Answer]


@dataclass(frozen=True)
class Group:
    """Examples of one kind: a title with their number, and the few that are shown."""

    title: str
    examples: list[Example]


@dataclass(frozen=True)
class Differing:
    """How one arm differs from its reference."""

    name: str
    label: str
    line: str
    groups: list[Group]


def differing(comparison: Comparison) -> list[Differing]:
    """Return every arm with examples on which it differs from its reference, the headline arm first."""
    entries, headline = comparison.get("disagreements") or {}, sentences.headline_arm(comparison)
    names = [name for name in facts.arms(comparison) if facts.number((entries.get(name) or {}).get("examples"))]
    return [_one(comparison, name, entries[name]) for name in sorted(names, key=lambda name: name != headline)]


def _one(comparison: Comparison, name: str, entry: dict[str, Any]) -> Differing:
    other = entry.get("against") or ""
    label, against = facts.label(comparison, name), sentences.mentioned(comparison, other)
    counts = {kind: (entry.get(kind) or {}).get("count") or 0 for kind in ("gained", "lost", "changed")}
    of, seed = fmt.count(entry.get("examples")), entry.get("seed")
    gained, lost, changed = (fmt.count(counts[kind]) for kind in ("gained", "lost", "changed"))
    if entry.get("kind") == "right":
        line = f"{label} is right where {against} is wrong on {gained}, and wrong where it is right on {lost}, of {of} "
        titles = [f"{label} right, {against} wrong", f"{label} wrong, {against} right"]
    elif entry.get("kind") == "preference":
        line = f"The judge prefers the answer of {label} on {gained} and that of {against} on {lost}, of {of} "
        titles = [f"{label} preferred", f"{fmt.capitalized(against)} preferred"]
    else:
        line = f"{label} scores higher than {against} on {gained} and lower on {lost}, of {of} "
        titles = [f"{label} better", f"{label} worse"]
    line += f"test examples (seed {seed})."
    tie = "a tie" if entry.get("kind") == "preference" else "the same score"
    if counts["changed"]:
        line += f" On {changed} they give different answers with {tie}."
    titles.append(f"Different answers with {tie}")
    groups = [
        Group(
            f"{title}: {fmt.count(counts[kind])}",
            [_example(comparison, name, other, each) for each in (entry.get(kind) or {}).get("examples") or []],
        )
        for kind, title in zip(counts, titles, strict=True)
        if counts[kind]
    ]
    return Differing(name, label, line, groups)


def _example(comparison: Comparison, name: str, other: str, each: dict[str, Any]) -> Example:
    return Example(
        title=facts.plain(each.get("id")),
        prompt=facts.plain(each.get("prompt") or ""),
        reference=facts.plain(each.get("reference") or ""),
        answers=[
            Answer(facts.label(comparison, arm), facts.plain(each.get(text) or ""), _score(each.get(score)))
            for arm, text, score in ((name, "answer", "score"), (other, "answer_against", "score_against"))
        ],
    )


def _score(value: Any) -> str:
    value = facts.number(value)
    return "" if value is None else {0: "0", 1: "1"}.get(value, f"{value:.2f}")
