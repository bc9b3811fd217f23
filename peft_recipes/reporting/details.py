"""What stands below the table, as data: classes, answers side by side, images, conditions, notes, all metrics."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from peft_recipes.reporting import facts
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison


@dataclass
class ClassLine:
    """One class: its F1 for each arm of `Heat.arms`, None where an arm has none."""

    label: str
    support: float | None
    scores: list[float | None]


@dataclass
class Heat:
    """F1 by class and arm; `low` and `high` are the ends of its scale."""

    arms: list[str]
    lines: list[ClassLine]
    low: float
    high: float


def per_class(comparison: Comparison) -> Heat | None:
    """F1 by class, for the arms that have it; None where none has."""
    found = {name: {} for name, arm in facts.arms(comparison).items() if arm.get("per_class")}
    support: dict[str, float | None] = {}
    for name, scores in found.items():
        for line in facts.arms(comparison)[name]["per_class"]:
            called = facts.plain(line.get("label"))
            scores[called] = facts.number(line.get("f1"))
            support.setdefault(called, facts.number(line.get("support")))
    lines = [
        ClassLine(called, support[called], [scores.get(called) for scores in found.values()]) for called in support
    ]
    known = [score for line in lines for score in line.scores if score is not None]
    return Heat([facts.label(comparison, name) for name in found], lines, min(known), max(known)) if known else None


def conditions(comparison: Comparison) -> list[tuple[str, str]]:
    """What the figures were measured on, as (name, value) in words."""
    environment = comparison.get("environment") or {}
    sizes = [f"{fmt.count(size)} {split}" for split, size in (comparison.get("rows") or {}).items() if size is not None]
    machine = [
        environment.get("device_name") or environment.get("device"),
        _threads(environment),
        environment.get("precision"),
    ]
    versions = [f"{name} {version}" for name, version in (environment.get("versions") or {}).items()]
    python = [f"Python {environment['python']}"] if environment.get("python") else []
    seeds = comparison.get("seeds") or []
    told = {
        "Recipe": comparison.get("recipe"), "Task": comparison.get("task"), "Model": comparison.get("model"),
        "Data": comparison.get("dataset"),
        "Stand-ins": " and ".join(f"embedded {what}" for what in facts.stand_ins(comparison)),
        "Examples": ", ".join(sizes), "Seeds": ", ".join(map(str, seeds)), "Machine": ", ".join(filter(None, machine)),
        "System": environment.get("platform"), "Versions": ", ".join(python + versions),
        "Git commit": environment.get("git_commit"),
        "Data fingerprint": environment.get("dataset_fingerprint"),
    }  # fmt: skip
    return [(name, facts.plain(value)) for name, value in told.items() if value]


def _threads(environment: dict) -> str | None:
    threads = environment.get("threads")
    return f"{threads} thread{'' if threads == 1 else 's'}" if threads else None


def notes(comparison: Comparison) -> list[str]:
    """The comparison's notes, then each arm's with its label; what was said of several arms stands once."""
    told = [facts.plain(note) for note in comparison.get("notes") or []]
    by_note: dict[str, list[str]] = {}
    for name, arm in facts.arms(comparison).items():
        for note in arm.get("notes") or []:
            by_note.setdefault(facts.plain(note), []).append(facts.label(comparison, name))
    every = len(facts.arms(comparison))
    return told + [note if len(who) == every > 1 else f"{', '.join(who)}: {note}" for note, who in by_note.items()]


def side_by_side(comparison: Comparison) -> list[tuple[dict, list[tuple[str, str]]]]:
    """Each prompt with the answers to it: (the base's answer's dict, [(who, answer)]), the base first, then the arms.

    Answers are matched by index; one to another prompt (a run with other data) is left out.
    """
    holders = [("Base, untuned", (comparison.get("base") or {}).get("answers") or [])]
    holders += [
        (facts.label(comparison, name), arm.get("answers") or []) for name, arm in facts.arms(comparison).items()
    ]
    longest = max((answers for _, answers in holders), key=len)
    groups = []
    for index, asked in enumerate(longest):
        found = [(who, answers[index]) for who, answers in holders if index < len(answers)]
        same = [
            (who, facts.plain(answer.get("answer") or ""))
            for who, answer in found
            if answer.get("prompt") == asked.get("prompt")
        ]
        groups.append((asked, same))
    return groups


@dataclass
class Sample:
    """One example image before and after the shift; PNG bytes."""

    label: str
    before: bytes
    after: bytes


def samples(comparison: Comparison) -> list[Sample]:
    """The sample images that are whole PNG files; anything else is left out."""
    found = []
    for sample in comparison.get("samples") or []:
        before, after = _png(sample.get("before")), _png(sample.get("after"))
        if before and after:
            found.append(Sample(facts.shorten(str(sample.get("label", "")), 40), before, after))
    return found


def _png(text: object) -> bytes | None:
    try:
        data = base64.b64decode(str(text or ""), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if data.startswith(b"\x89PNG\r\n\x1a\n") else None


def all_metrics(comparison: Comparison) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Every metric of every split: (who, split, [(metric, value)]), the base first; what isn't finite is left out."""
    holders = [("Base, untuned", comparison.get("base") or {})]
    holders += [(facts.label(comparison, name), arm) for name, arm in facts.arms(comparison).items()]
    found = []
    for who, holder in holders:
        for split, values in (holder.get("metrics") or {}).items():
            known = [
                (fmt.metric_title(facts.plain(name)), fmt.quality(value, name))
                for name, value in (values or {}).items()
                if facts.number(value) is not None
            ]
            if known:
                found.append((who, facts.plain(split), known))
    return found
