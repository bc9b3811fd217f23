"""Data for the report's sections below the table: classes, answers, images, conditions, notes, all metrics."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from peft_recipes.reporting import facts
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison

BASE_LABEL = "Base, untuned"


@dataclass
class ClassTable:
    """F1 by class and arm: (class, test examples, F1 for each arm or None), with the lowest and the highest F1."""

    arms: list[str]
    lines: list[tuple[str, float | None, list[float | None]]]
    low: float
    high: float


def per_class(comparison: Comparison) -> ClassTable | None:
    """Return F1 by class for the arms that have it; None if no arm has."""
    reports = {name: arm["per_class"] for name, arm in facts.arms(comparison).items() if arm.get("per_class")}
    support: dict[str, float | None] = {}
    scores: dict[str, dict[str, float | None]] = {name: {} for name in reports}
    for name, report in reports.items():
        for line in report:
            label = facts.plain(line.get("label"))
            scores[name][label] = facts.number(line.get("f1"))
            support.setdefault(label, facts.number(line.get("support")))
    lines = [(label, examples, [f1.get(label) for f1 in scores.values()]) for label, examples in support.items()]
    known = [score for _, _, line in lines for score in line if score is not None]
    if not known:
        return None
    return ClassTable([facts.label(comparison, name) for name in reports], lines, min(known), max(known))


def conditions(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what the figures were measured on, as (name, value)."""
    environment = comparison.get("environment") or {}
    sizes = [f"{fmt.count(size)} {split}" for split, size in (comparison.get("rows") or {}).items() if size is not None]
    device, threads = environment.get("device_name") or environment.get("device"), environment.get("threads")
    thread_count = f"{threads} thread{'' if threads == 1 else 's'}" if threads else None
    python = [f"Python {environment['python']}"] if environment.get("python") else []
    versions = python + [f"{name} {version}" for name, version in (environment.get("versions") or {}).items()]
    values = {
        "Recipe": comparison.get("recipe"),
        "Task": comparison.get("task"),
        "Model": comparison.get("model"),
        "Data": comparison.get("dataset"),
        "Stand-ins": " and ".join(f"embedded {part}" for part in facts.stand_ins(comparison)),
        "Examples": ", ".join(sizes),
        "Seeds": ", ".join(map(str, comparison.get("seeds") or [])),
        "Machine": ", ".join(filter(None, [device, thread_count, environment.get("precision")])),
        "System": environment.get("platform"),
        "Versions": ", ".join(versions),
        "Git commit": environment.get("git_commit"),
        "Data fingerprint": environment.get("dataset_fingerprint"),
    }
    return [(name, facts.plain(value)) for name, value in values.items() if value]


def notes(comparison: Comparison) -> list[str]:
    """Return the comparison's notes, then those of the arms, each once with the labels of its arms."""
    by_note: dict[str, list[str]] = {}
    for name, arm in facts.arms(comparison).items():
        for note in arm.get("notes") or []:
            by_note.setdefault(facts.plain(note), []).append(facts.label(comparison, name))
    arm_count = len(facts.arms(comparison))
    general = [facts.plain(note) for note in comparison.get("notes") or []]
    return general + [
        note if len(labels) == arm_count > 1 else f"{', '.join(labels)}: {note}" for note, labels in by_note.items()
    ]


def _base_and_arms(comparison: Comparison) -> list[tuple[str, dict]]:
    arms = [(facts.label(comparison, name), arm) for name, arm in facts.arms(comparison).items()]
    return [(BASE_LABEL, comparison.get("base") or {}), *arms]


def side_by_side(comparison: Comparison) -> list[tuple[dict, list[tuple[str, str]]]]:
    """Return each prompt with its answers: (entry with the prompt, [(label, answer)]), the base first.

    Answers are matched by index. An answer to another prompt (a run with other data) is left out.
    """
    answers_by = [(label, entry.get("answers") or []) for label, entry in _base_and_arms(comparison)]
    longest = max((answers for _, answers in answers_by), key=len)
    return [
        (
            prompt,
            [
                (label, _answer(answers[index]))
                for label, answers in answers_by
                if index < len(answers) and answers[index].get("prompt") == prompt.get("prompt")
            ],
        )
        for index, prompt in enumerate(longest)
    ]


def _answer(entry: dict) -> str:
    """An answer's text, or why there is none."""
    if entry.get("skipped"):
        return f"(no answer: {facts.plain(entry['skipped'])})"
    return facts.plain(entry.get("answer") or "")


@dataclass
class Sample:
    """An example image before and after the shift, as PNG bytes."""

    label: str
    before: bytes
    after: bytes


def samples(comparison: Comparison) -> list[Sample]:
    """Return the sample images; those that aren't PNG files are left out."""
    images = []
    for sample in comparison.get("samples") or []:
        before, after = _png(sample.get("before")), _png(sample.get("after"))
        if before and after:
            images.append(Sample(facts.shorten(str(sample.get("label", "")), 40), before, after))
    return images


def _png(text: object) -> bytes | None:
    try:
        data = base64.b64decode(str(text or ""), validate=True)
    except ValueError:
        return None
    return data if data.startswith(b"\x89PNG\r\n\x1a\n") else None


def all_metrics(comparison: Comparison) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return every finite metric of every split as (label, split, [(metric, value)]), the base first."""
    table = []
    for label, entry in _base_and_arms(comparison):
        for split, values in (entry.get("metrics") or {}).items():
            finite = [
                (fmt.metric_title(facts.plain(name)), fmt.quality(value, name))
                for name, value in (values or {}).items()
                if facts.number(value) is not None
            ]
            if finite:
                table.append((label, facts.plain(split), finite))
    return table
