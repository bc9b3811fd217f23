"""The report as Markdown, for GitHub, the Hub and editors. Untrusted text is escaped or in a code block."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft_recipes.reporting import (
    advice,
    answer_figures,
    below_table,
    details,
    differing,
    facts,
    provisional,
    rank_sentences,
    rows,
    sentences,
)
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison

_SPECIAL = re.compile(r"([\\`*_\[\]|~$#])")


def escape(text: object) -> str:
    """Escape untrusted text on one line, so that it contains no markup, no HTML and no table cell."""
    line = " ".join(facts.plain(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def fence(text: str, language: str = "text") -> str:
    """Return a code block whose fence is longer than any run of backticks in it."""
    shown = facts.plain(text)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{shown}\n{marks}"


def render_markdown(comparison: Comparison, images: Iterable[tuple[str, str, str, str]] = ()) -> str:
    """Return the report. `images`: (title, caption, alt text, path relative to the report) of the figures on disk."""
    name = sentences.headline_arm(comparison)
    parts = [f"# {escape(comparison.get('title') or comparison.get('recipe', 'Comparison'))}"]
    if banner := provisional.banner(comparison):
        parts.append(
            "\n".join(
                f"> {line}  " for line in [f"**{escape(banner)}**", *map(escape, provisional.details(comparison))]
            )
        )
    if name is not None:
        parts.append(f"**{escape(sentences.verdict_headline(comparison, name))}**")
        parts += [f"*{escape(caveat)}*" for caveat in sentences.caveats(comparison, name)]
    parts.append(table_markdown(comparison, most=rows.DECIDES))
    parts += [f"**{escape(line)}**" for line in answer_figures.alarms(comparison)]
    parts += [escape(line) for line in below_table.verdicts(comparison)]
    parts += [escape(line) for line in below_table.failed_checks(comparison)]
    parts += [escape(line) for line in [*rank_sentences.rank_lines(comparison), *sentences.forgetting(comparison)]]
    for title, caption, alt, path in images:
        parts += [f"## {escape(title)}", f"![{escape(alt)}]({path})"] + ([escape(caption)] if caption else [])
    parts += _more_figures(comparison)
    parts += [
        *_per_class(comparison),
        *_answers(comparison),
        *_differing(comparison),
        *_next_steps(comparison),
        *_conditions(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def pipe_table(header: list[str], cells: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """Return a Markdown table; the columns with an index in `left` are left-aligned, the others right-aligned."""
    rule = "|".join(":---" if index in left else "---:" for index in range(len(header)))
    lines = ["| " + " | ".join(row) + " |" for row in (header, *cells)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def table_markdown(comparison: Comparison, most: int = 9) -> str:
    """Return the comparison's table, with the columns up to the priority `most` (3: quality and costs)."""
    table = rows.table(comparison)
    return _arm_table([column for column in table.columns if column.priority <= most], table.rows)


def _more_figures(comparison: Comparison) -> list[str]:
    """Return the columns that the first table does not have."""
    table = rows.table(comparison)
    shown = [row for row in table.rows if row.kind not in ("failed", "pending")]
    return ["## More figures", _arm_table(table.more, shown)] if table.more else []


def _arm_table(columns: list[rows.Column], arms: list[rows.Row]) -> str:
    lines = []
    for row in arms:
        if row.kind in ("failed", "pending"):
            cells = [f"*{escape(row.reason)}*", *[""] * (len(columns) - 1)]
        else:
            cells = [_cell(row.cells.get(column.key)) for column in columns]
        lines.append([escape(row.label), *cells])
    left = (0, *(index for index, column in enumerate(columns, start=1) if column.key == "verdict"))
    return pipe_table(["Arm", *(escape(column.title) for column in columns)], lines, left)


def _cell(cell: rows.Cell | None) -> str:
    return "" if cell is None or cell.text == fmt.NOTHING else escape(cell)


def _per_class(comparison: Comparison) -> list[str]:
    table = details.per_class(comparison)
    if table is None:
        return []
    lines = [
        [escape(label), fmt.count(support), *(fmt.quality(score, "f1") for score in scores)]
        for label, support, scores in table.lines
    ]
    return ["## F1 by class", pipe_table(["Class", "Test examples", *map(escape, table.arms)], lines)]


def _answers(comparison: Comparison) -> list[str]:
    parts = []
    for prompt, answers in details.side_by_side(comparison):
        parts += [f"### {escape(str(prompt.get('kind', 'prompt')).capitalize())}", fence(prompt.get("prompt") or "")]
        for label, answer in answers:
            parts += [f"**{escape(label)}**", fence(answer or "(nothing)")]
    return ["## Answers side by side", *parts] if parts else []


def _differing(comparison: Comparison) -> list[str]:
    """Return a line for each arm, and of the first one an example each way; the page has more."""
    arms = differing.differing(comparison)
    if not arms:
        return []
    parts = ["## Where the arms differ", *(escape(arm.line) for arm in arms)]
    for group in arms[0].groups[:2]:
        for example in group.examples[:1]:
            answers = [(one.label, one.text or "(nothing)") for one in example.answers]
            texts = [("Prompt", example.prompt), ("Reference", example.reference), *answers]
            lines = [f"- {escape(title)}: {escape(facts.shorten(text, 300))}" for title, text in texts if text]
            parts += [f"**{escape(group.title)}**; example {escape(example.title)}:", "\n".join(lines)]
    return parts


def _next_steps(comparison: Comparison) -> list[str]:
    lines = [
        "- "
        + "".join(f"`{piece}`" if is_code else escape_inline(piece) for is_code, piece in sentences.code_spans(step))
        for step in advice.next_steps(comparison)
    ]
    return ["## What to try next", "\n".join(lines)] if lines else []


def escape_inline(text: str) -> str:
    """Escape untrusted text like `escape`, but keep a space at either end."""
    body = escape(text)
    return f"{' ' if text[:1] == ' ' else ''}{body}{' ' if text[-1:] == ' ' and body else ''}"


def _conditions(comparison: Comparison) -> list[str]:
    lines = [f"- {escape(name)}: {escape(value)}" for name, value in details.conditions(comparison)]
    lines += [f"- {escape(column.title)}: {escape(column.meaning)}." for column in rows.table(comparison).columns]
    lines += [f"- {escape(note)}" for note in details.notes(comparison)]
    return ["## How it was measured", "\n".join(lines)]
