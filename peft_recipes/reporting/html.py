"""The report as one page that needs nothing from outside it: style, figures and images stand in the file. No script."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from peft_recipes.reporting import advice, details, facts, figure_style, rank_sentences, rows, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot

LONG_ANSWER = 450  # characters from which an answer is folded
SHAPES = {  # an arm's marker as a path in a box of 12 x 12, the same as in the figures
    "o": "M6 1.5a4.5 4.5 0 1 0 .01 0z", "s": "M2 2h8v8H2z", "^": "M6 1.5 11 10.5H1z", "D": "M6 .8 11.2 6 6 11.2.8 6z",
    "v": "M6 10.5 1 1.5h10z", "P": "M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z",
    "X": "M1 3.4 3.4 1 6 3.6 8.6 1 11 3.4 8.4 6 11 8.6 8.6 11 6 8.4 3.4 11 1 8.6 3.6 6z",
    "*": "M6 .8 7.4 4.5 11.4 4.6 8.2 7 9.3 10.9 6 8.6 2.7 10.9 3.8 7 .6 4.6 4.6 4.5z",
}  # fmt: skip


def render_html(comparison: Comparison, plots: list[Plot] | None = None) -> str:
    """The page as text. `plots` are the figures where they were built already; else they are built here."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    if plots is None:
        from peft_recipes.reporting.plots import plots as build

        plots = build(comparison)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["unbroken"] = unbroken
    figures = [{"plot": plot, "svg": Markup(plot.svg())} for plot in plots]  # escaped where it was drawn
    return environment.get_template("report.html.j2").render(**_page(comparison), figures=figures)


def unbroken(text: str) -> str:
    """`text` with no line break between a number and its unit, nor between a minus and its number."""
    text = re.sub(r"(\d) (%|[kMGT]?B|ms|s|min|h|points?|k|M)(?![\w])", "\\1\u00a0\\2", text)
    return re.sub(r"(?<=[\s(])-(?=\d)", "\u2212", text)  # a minus sign, where a hyphen would let the line break


def _page(comparison: Comparison) -> dict[str, Any]:
    """Everything the template shows; it only lays out, and decides nothing."""
    name = sentences.headline_arm(comparison)
    told = sentences.describe_difference(comparison, name) if name else None
    return {
        "title": facts.plain(comparison.get("title") or comparison.get("recipe") or "Comparison"),
        "recipe": facts.plain(comparison.get("recipe") or ""),
        "task": facts.plain(comparison.get("task") or "").replace("-", " "),
        "embedded": bool(comparison.get("embedded")),
        "headline": sentences.verdict_headline(comparison, name) if name else "No arm has been run yet.",
        "caveats": sentences.caveats(comparison, name) if name else [],
        "verdict": told.verdict if told else None,
        "symbols": rows.SYMBOLS,
        "tiles": _tiles(comparison, name) if name else [],
        "table": rows.table(comparison),
        "keys": _keys(comparison),
        "nothing": fmt.NOTHING,
        "ranks": rank_sentences.rank_lines(comparison),
        "forgetting": sentences.forgetting(comparison),
        "heat": _heat(comparison),
        "samples": [
            {"label": sample.label, "before": _data(sample.before), "after": _data(sample.after)}
            for sample in details.samples(comparison)
        ],
        "answers": _answers(comparison),
        "steps": [sentences.code_spans(step) for step in advice.next_steps(comparison)],
        "conditions": details.conditions(comparison),
        "notes": details.notes(comparison),
        "metrics": details.all_metrics(comparison),
        "components": _components(comparison),
        "failures": _failures(comparison),
    }


def _data(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _keys(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Each arm's marker, as in the figures: a path and the name of its colour."""
    return {
        name: {"path": SHAPES.get(style.marker, SHAPES["o"]), "colour": figure_style.VARIABLES[style.colour]}
        for name, style in figure_style.arm_styles(comparison).items()
    }


def _tiles(comparison: Comparison, name: str) -> list[dict[str, str]]:
    """The headline arm's figures, large: what was kept, then what it cost, each beside full's."""
    arms = facts.arms(comparison)
    arm, against = arms[name], facts.reference(comparison, name)
    other = arms.get(against or "") if against != name else None
    if facts.mean(arm) is None:
        return []
    metric = facts.metric(comparison)
    base = facts.base_value(comparison)
    beside = [f"full {fmt.quality(facts.mean(other), metric)}"] if facts.mean(other) is not None else []
    beside += [f"base {fmt.quality(base, metric)}"] if base is not None else []
    tiles = [
        {
            "name": f"Test {fmt.metric_title(metric)}",
            "value": fmt.quality(facts.mean(arm), metric),
            "beside": ", ".join(beside),
        }
    ]
    for title, field, show in (
        ("Trained parameters", "trainable_parameters", fmt.short_count),
        ("Peak memory", "peak_memory_bytes", fmt.human_bytes),
        ("Training time", "training_seconds", fmt.seconds),
        ("Checkpoint", "checkpoint_bytes", fmt.human_bytes),
    ):  # fmt: skip
        if facts.number(arm.get(field)) is None:
            continue
        share = facts.ratio(arm, other, field)
        text = f"{fmt.percent(share)} of full's {show(other[field])}" if share is not None else ""
        tiles.append({"name": title, "value": show(arm[field]), "beside": text})
    return tiles


def _heat(comparison: Comparison) -> dict[str, Any] | None:
    """F1 by class with each cell's place on the scale from the lowest to the highest, 0 to 1."""
    found = details.per_class(comparison)
    if found is None:
        return None
    span = found.high - found.low

    def cell(score: float | None) -> dict[str, Any]:
        level = None if score is None else round((score - found.low) / span, 3) if span else 1
        return {"text": fmt.quality(score, "f1"), "level": level}

    lines = [
        {"label": line.label, "support": fmt.count(line.support), "cells": [cell(score) for score in line.scores]}
        for line in found.lines
    ]
    return {
        "arms": found.arms,
        "lines": lines,
        "low": fmt.quality(found.low, "f1"),
        "high": fmt.quality(found.high, "f1"),
    }


def _answers(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "kind": facts.plain(asked.get("kind") or "prompt").capitalize(),
            "prompt": facts.plain(asked.get("prompt") or ""),
            "by": [
                {"who": who, "text": text, "long": len(text) > LONG_ANSWER, "start": text[: LONG_ANSWER // 2].rstrip()}
                for who, text in found
            ],
        }
        for asked, found in details.side_by_side(comparison)
    ]


def _components(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The base's parameters by component: (component, count, part of all)."""
    base = comparison.get("base") or {}
    counts = {facts.plain(k): facts.number(v) or 0 for k, v in (base.get("parameters_by_component") or {}).items()}
    total = facts.number(base.get("total_parameters")) or sum(counts.values())
    return [(name, fmt.count(value), fmt.percent(value / total)) for name, value in counts.items() if value and total]


def _failures(comparison: Comparison) -> list[tuple[str, str]]:
    """Every run that failed, as (arm and seed, the whole error)."""
    found = []
    for name, arm in facts.arms(comparison).items():
        called = facts.label(comparison, name)
        lines = [
            (f"{called}, seed {one.get('seed')}", facts.plain(one.get("error") or ""))
            for one in arm.get("failures") or []
        ]
        if arm.get("error") and not any(arm["error"] == text for _, text in lines):
            lines.insert(0, (called, facts.plain(arm["error"])))
        found += lines
    return found
