"""The report as Markdown, for GitHub, the Hub and editors. Text from outside is escaped, or stands in a fence."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft_recipes.reporting import advice, details, facts, rank_sentences, rows, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison

_SPECIAL = re.compile(r"([\\`*_\[\]|~$#])")


def escape(text: object) -> str:
    """Text from outside as Markdown that shows it as it is, on one line: no markup, no HTML, no new table cell."""
    line = " ".join(facts.plain(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def fence(text: str, language: str = "text") -> str:
    """A code block that no run of backticks inside can end."""
    shown = facts.plain(text)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{shown}\n{marks}"


def render_markdown(comparison: Comparison, images: Iterable[tuple[str, str, str, str]] = ()) -> str:
    """The whole report. `images` are (title, caption, alt text, path relative to the report) of figures on disk."""
    name = sentences.headline_arm(comparison)
    parts = [f"# {escape(comparison.get('title') or comparison.get('recipe', 'Comparison'))}"]
    if name is not None:
        parts.append(f"**{escape(sentences.verdict_headline(comparison, name))}**")
        parts += [f"*{escape(caveat)}*" for caveat in sentences.caveats(comparison, name)]
    parts.append(table_markdown(comparison))
    parts += [escape(line) for line in [*rank_sentences.rank_lines(comparison), *sentences.forgetting(comparison)]]
    for title, caption, alt, path in images:
        parts += [f"## {escape(title)}", f"![{escape(alt)}]({path})"] + ([escape(caption)] if caption else [])
    parts += [*_per_class(comparison), *_answers(comparison), *_next_steps(comparison), *_conditions(comparison)]
    return "\n\n".join(parts) + "\n"


def table_markdown(comparison: Comparison, most: int = 9) -> str:
    """The comparison's table alone, for a model card or a README; `most=3` leaves out throughput, latency and rate."""
    found = rows.table(comparison)
    columns = [column for column in found.columns if column.priority <= most]
    lines = [
        "| " + " | ".join(["Arm", *(escape(column.title) for column in columns)]) + " |",
        "|" + "|".join([":---", *(":---" if column.key == "verdict" else "---:" for column in columns)]) + "|",
    ]
    for row in found.rows:
        if row.kind == "failed":
            cells = [f"*{escape(row.reason)}*", *[""] * (len(columns) - 1)]
        else:
            cells = [_cell(row.cells.get(column.key)) for column in columns]
        lines.append("| " + " | ".join([escape(row.label), *cells]) + " |")
    return "\n".join(lines)


def _cell(cell: rows.Cell | None) -> str:
    return "" if cell is None or cell.text == fmt.NOTHING else escape(cell)


def _per_class(comparison: Comparison) -> list[str]:
    heat = details.per_class(comparison)
    if heat is None:
        return []
    lines = [
        "| " + " | ".join(["Class", "Test examples", *(escape(label) for label in heat.arms)]) + " |",
        "|:---|---:" + "|---:" * len(heat.arms) + "|",
    ]
    for line in heat.lines:
        scores = [fmt.quality(score, "f1") for score in line.scores]
        lines.append("| " + " | ".join([escape(line.label), fmt.count(line.support), *scores]) + " |")
    return ["## F1 by class", "\n".join(lines)]


def _answers(comparison: Comparison) -> list[str]:
    parts = []
    for asked, found in details.side_by_side(comparison):
        parts += [f"### {escape(str(asked.get('kind', 'prompt')).capitalize())}", fence(asked.get("prompt") or "")]
        for who, answer in found:
            parts += [f"**{escape(who)}**", fence(answer or "(nothing)")]
    return ["## Answers side by side", *parts] if parts else []


def _next_steps(comparison: Comparison) -> list[str]:
    steps = advice.next_steps(comparison)
    if not steps:
        return []
    lines = [
        "".join(f"`{piece}`" if code else escape_inline(piece) for code, piece in sentences.code_spans(step))
        for step in steps
    ]
    return ["## What to try next", "\n".join(f"- {line}" for line in lines)]


def escape_inline(text: str) -> str:
    """Like `escape`, with the spaces at the ends kept."""
    body = escape(text)
    return f"{' ' if text[:1] == ' ' else ''}{body}{' ' if text[-1:] == ' ' and body else ''}"


def _conditions(comparison: Comparison) -> list[str]:
    lines = [f"- {escape(name)}: {escape(value)}" for name, value in details.conditions(comparison)]
    lines += [f"- {escape(column.title)}: {escape(column.meaning)}." for column in rows.table(comparison).columns]
    lines += [f"- {escape(note)}" for note in details.notes(comparison)]
    return ["## How it was measured", "\n".join(lines)]
