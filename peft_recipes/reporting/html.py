"""The report as one self-contained HTML page: style, figures and images are in the file. No script."""

from __future__ import annotations

import base64
import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup

from peft_recipes.reporting import (
    advice,
    answer_figures,
    below_table,
    data,
    details,
    differing,
    facts,
    figure_style,
    provisional,
    rank_sentences,
    rows,
    sentences,
)
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot
from peft_recipes.reporting.plots import plots as build_plots

LONG_ANSWER = 450  # longer answers (in characters) are folded
SHAPES = {  # the markers of the figures as SVG paths in a box of 12 x 12
    "o": "M6 1.5a4.5 4.5 0 1 0 .01 0z", "s": "M2 2h8v8H2z", "^": "M6 1.5 11 10.5H1z", "D": "M6 .8 11.2 6 6 11.2.8 6z",
    "v": "M6 10.5 1 1.5h10z", "P": "M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z",
    "X": "M1 3.4 3.4 1 6 3.6 8.6 1 11 3.4 8.4 6 11 8.6 8.6 11 6 8.4 3.4 11 1 8.6 3.6 6z",
    "*": "M6 .8 7.4 4.5 11.4 4.6 8.2 7 9.3 10.9 6 8.6 2.7 10.9 3.8 7 .6 4.6 4.6 4.5z",
}  # fmt: skip


def render_html(comparison: Comparison, plots: list[Plot] | None = None, home: str = "") -> str:
    """Return the page. plots: the figures if they exist already; None builds them. home: a page to link back to."""
    plots = build_plots(comparison) if plots is None else plots
    figures = [{"plot": plot, "svg": Markup(plot.svg())} for plot in plots]  # the SVG is already escaped
    return _template().render(**_page(comparison), figures=figures, home=home)


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["unbroken"] = unbroken
    return environment.get_template("report.html.j2")


def unbroken(text: str) -> str:
    """Prevent line breaks between a number and its unit or its minus sign, and within ROUGE-L."""
    text = re.sub(r"(\d) (%|[kMGT]?B|ms|s|min|h|points?|k|M)(?![\w])", "\\1\u00a0\\2", text)
    text = re.sub(r"(?<=[A-Z])-(?=[A-Z]\b)", "\u2011", text)
    return re.sub(r"(?<=[\s(])-(?=\d)", "\u2212", text)  # a line can break after a hyphen


def _page(comparison: Comparison) -> dict[str, Any]:
    """Return the variables of the template."""
    name = sentences.headline_arm(comparison)
    difference = sentences.describe_difference(comparison, name) if name else None
    return {
        "title": facts.plain(comparison.get("title") or comparison.get("recipe") or "Comparison"),
        "recipe": facts.plain(comparison.get("recipe") or ""),
        "task": facts.plain(comparison.get("task") or "").replace("-", " "),
        "embedded": bool(comparison.get("embedded")),
        "headline": sentences.verdict_headline(comparison, name) if name else "No arm has been run yet.",
        "caveats": sentences.caveats(comparison, name) if name else [],
        "verdict": difference.verdict if difference else None,
        "so_far": " so far" if difference and provisional.is_open(comparison, name) else "",
        "provisional": provisional.banner(comparison),
        "still_open": provisional.details(comparison),
        "grid": provisional.grid(comparison),
        "symbols": rows.SYMBOLS,
        "tiles": _tiles(comparison, name) if name else [],
        "table": rows.table(comparison),
        "markers": _markers(comparison),
        "nothing": fmt.NOTHING,
        "alarms": answer_figures.alarms(comparison),
        "several": below_table.verdicts(comparison),
        "failed_checks": below_table.failed_checks(comparison),
        "ranks": rank_sentences.rank_lines(comparison),
        "forgetting": sentences.forgetting(comparison),
        "heat": _heat(comparison),
        "samples": [
            {"label": sample.label, "before": _data_url(sample.before), "after": _data_url(sample.after)}
            for sample in details.samples(comparison)
        ],
        "answers": _answers(comparison),
        "differing": differing.differing(comparison),
        "data": data.section(comparison),
        "steps": [sentences.code_spans(step) for step in advice.next_steps(comparison)],
        "conditions": details.conditions(comparison),
        "notes": details.notes(comparison),
        "metrics": details.all_metrics(comparison),
        "components": _components(comparison),
        "failures": _failures(comparison),
    }


def _data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _markers(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Return each arm's marker in the figures: SVG path and CSS variable of its colour."""
    return {
        name: {"path": SHAPES.get(style.marker, SHAPES["o"]), "colour": figure_style.VARIABLES[style.colour]}
        for name, style in figure_style.arm_styles(comparison).items()
    }


def _tiles(comparison: Comparison, name: str) -> list[dict[str, str]]:
    """Return the headline arm's figures: its quality, then its costs, each compared with full."""
    arms = facts.arms(comparison)
    arm, against = arms[name], facts.reference(comparison, name)
    other = arms.get(against or "") if against != name else None
    if facts.mean(arm) is None:
        return []
    metric = facts.metric(comparison)
    values = {"full": facts.mean(other), "base": facts.base_value(comparison)}
    compared = ", ".join(f"{label} {fmt.quality(v, metric)}" for label, v in values.items() if v is not None)
    title = f"Test {fmt.metric_title(metric)}"
    tiles = [{"name": title, "value": fmt.quality(facts.mean(arm), metric), "compared": compared}]
    for title, field, show in (
        ("Trained parameters", "trainable_parameters", fmt.short_count),
        ("Peak memory", "peak_memory_bytes", fmt.human_bytes),
        ("Training time", "training_seconds", fmt.seconds),
        ("Checkpoint", "checkpoint_bytes", fmt.human_bytes),
    ):
        if facts.number(arm.get(field)) is None:
            continue
        share = facts.ratio(arm, other, field)
        compared = f"{fmt.percent(share)} of full's {show(other[field])}" if share is not None else ""
        tiles.append({"name": title, "value": show(arm[field]), "compared": compared})
    return tiles


def _heat(comparison: Comparison) -> dict[str, Any] | None:
    """Return F1 by class; the `level` of a cell is 0 for the lowest F1 and 1 for the highest."""
    table = details.per_class(comparison)
    if table is None:
        return None
    span = table.high - table.low

    def cell(score: float | None) -> dict[str, Any]:
        level = None if score is None else round((score - table.low) / span, 3) if span else 1
        return {"text": fmt.quality(score, "f1"), "level": level}

    lines = [
        {"label": label, "support": fmt.count(support), "cells": [cell(score) for score in scores]}
        for label, support, scores in table.lines
    ]
    low, high = fmt.quality(table.low, "f1"), fmt.quality(table.high, "f1")
    return {"arms": table.arms, "lines": lines, "low": low, "high": high}


def _answers(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "kind": facts.plain(prompt.get("kind") or "prompt").capitalize(),
            "prompt": facts.plain(prompt.get("prompt") or ""),
            "by": [
                {
                    "label": label,
                    "text": text,
                    "fold": len(text) > LONG_ANSWER,
                    "start": text[: LONG_ANSWER // 2].rstrip(),
                }
                for label, text in answers
            ],
        }
        for prompt, answers in details.side_by_side(comparison)
    ]


def _components(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Return the base's parameters by component: (component, count, share)."""
    base = comparison.get("base") or {}
    counts = {facts.plain(k): facts.number(v) or 0 for k, v in (base.get("parameters_by_component") or {}).items()}
    total = facts.number(base.get("total_parameters")) or sum(counts.values())
    return [(name, fmt.count(value), fmt.percent(value / total)) for name, value in counts.items() if value and total]


def _failures(comparison: Comparison) -> list[tuple[str, str]]:
    """Return every failed run as (arm and seed, complete error)."""
    failures = []
    for name, arm in facts.arms(comparison).items():
        label = facts.label(comparison, name)
        errors = [(one.get("seed"), facts.plain(one.get("error") or "")) for one in arm.get("failures") or []]
        if arm.get("error") and arm["error"] not in [text for _, text in errors]:
            failures.append((label, facts.plain(arm["error"])))
        failures += [(f"{label}, seed {seed}", text) for seed, text in errors]
    return failures
