"""The report in the terminal: verdict, table, forgetting, advice."""

from __future__ import annotations

import textwrap
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

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

COLOURS = {"equivalent": "green", "better": "blue", "worse": "yellow", "not shown": "bright_black"}
ANSWER_LIMIT = 220
LABEL_WIDTH = 16  # of a line of an arm's label: a label may have two lines, as a cell has
GAP = 2  # between columns


def render_terminal(comparison: Comparison, console: Console) -> None:
    """Print the comparison to a rich console. Untrusted text is never read as markup or as a control sequence."""
    title = f"  {comparison['title']}" if comparison.get("title") else ""
    line = heading(comparison.get("recipe", "comparison"), title, bool(comparison.get("embedded")))
    console.print(Padding(line, (1, 0, 0, 0)))
    for number, text in enumerate([provisional.banner(comparison), *provisional.details(comparison)]):
        if text:
            console.print(Text(text, style="dim" if number else "bold blue"))
    _print_verdict(comparison, console)
    table = rows.table(comparison)
    columns = _fitting(table, console.width)
    console.print()
    console.print(_table(table, columns))
    keys = {column.key for column in columns}
    lines = below_table.verdicts(comparison)
    lines += rank_sentences.rank_lines(comparison)
    shown_below = ("split:", "latency_ms")
    missing = [c.short or c.title for c in table.columns if c not in columns and not c.key.startswith(shown_below)]
    if missing:
        console.print(Text(f"(no room here for {', '.join(missing)}: they are in the report)", style="dim"))
    for row in table.rows:
        if row.kind == "failed":
            console.print(Text(f"✗ {row.label}: {row.reason}", style="red"))
        elif row.kind == "pending":
            console.print(Text(f"· {row.label}: {row.reason}", style="dim"))
    for line in [*answer_figures.alarms(comparison), *below_table.failed_checks(comparison)]:
        console.print(Text(line, style="yellow"))
    if not any(key.startswith("split:") for key in keys):
        lines += sentences.forgetting(comparison)
    if "latency_ms" not in keys and (latency := sentences.latency(comparison)):
        lines.append(latency)
    lines += [arm.line for arm in differing.differing(comparison)[:1]]
    for line in lines:
        console.print(Text(line))
    _print_answers(comparison, console)
    _print_steps(advice.next_steps(comparison), console)


def heading(name: Any, text: str, embedded: bool) -> Text:
    """Return a heading: a name in bold, more text, and whether stand-ins were used."""
    heading = Text(facts.plain(name), style="bold").append(facts.plain(text), style="not bold")
    return heading.append("  embedded stand-ins", style="not bold yellow") if embedded else heading


def _print_verdict(comparison: Comparison, console: Console) -> None:
    name = sentences.headline_arm(comparison)
    if name is None:
        return
    difference = sentences.describe_difference(comparison, name)
    verdict = difference.verdict if difference else "not shown"
    title = f"{rows.SYMBOLS[verdict]} {verdict}" if difference else None
    if title and provisional.is_open(comparison, name):
        title += " so far"
    body = Text(sentences.verdict_headline(comparison, name))
    for caveat in sentences.caveats(comparison, name):
        body.append(f"\n{caveat}", style="dim")
    console.print(Panel(body, border_style=COLOURS[verdict], title=title, title_align="left", padding=(0, 1)))


def _print_steps(steps: list[str], console: Console) -> None:
    if not steps:
        return
    console.print(Text("\nWhat to try next", style="bold"))
    lines = Table.grid(padding=(0, 1))
    for step in steps:
        text, pieces = Text(), sentences.code_spans(step)
        if len(pieces) > 1 and pieces[-2][0] and pieces[-1] == (False, "."):
            pieces.pop()  # no full stop after a command, where it would be copied with it
        for is_code, piece in pieces:
            text.append(piece, style="cyan" if is_code else "")
        lines.add_row("-", text)
    console.print(lines)


def _fitting(table: rows.Table, width: int) -> list[rows.Column]:
    """Return the most important columns that fit into `width` characters; at least one."""
    room = width - max((len(line) for row in table.rows for line in _label(row).split("\n")), default=3)
    kept: list[rows.Column] = []
    for column in sorted(table.columns, key=lambda column: column.priority):
        room -= _width(table, column) + GAP
        if room < 0 and kept:
            break
        kept.append(column)
    return [column for column in table.columns if column in kept]


def _width(table: rows.Table, column: rows.Column) -> int:
    """Return the width of the longest cell line or heading word."""
    cells = [_cell(row, column).plain for row in table.rows]
    lines = [line for cell in cells for line in cell.split("\n")] + (column.short or column.title).split()
    return max(len(line) for line in lines)


def _table(table: rows.Table, columns: list[rows.Column]) -> object:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, GAP - 1, 0, 0))
    shown.add_column("Arm", no_wrap=True)
    for column in columns:
        heading = textwrap.fill(column.short or column.title, _width(table, column))
        shown.add_column(Text(heading), justify="left" if column.key == "verdict" else "right", no_wrap=True)
    for row in table.rows:
        label = Text(_label(row), style="dim" if row.kind == "base" else "")
        shown.add_row(label, *[_cell(row, column) for column in columns])
    return shown


def _label(row: rows.Row) -> str:
    return "\n".join(textwrap.wrap(facts.shorten(row.label, 6 * LABEL_WIDTH), LABEL_WIDTH, break_on_hyphens=False))


def _cell(row: rows.Row, column: rows.Column) -> Text:
    """Return a cell's text, the second line dim. A failed row says so as its verdict; the reason is below the table."""
    cell = row.cells.get(column.key)
    if row.kind == "pending" and column.key == "verdict":
        return Text(row.reason.split(",")[0].split(":")[0][:14], style="dim")
    if row.kind == "failed" and column.key == "verdict":
        return Text("✗ " + row.reason.split(":")[0][:14], style="red")
    if cell is None or cell.text == fmt.NOTHING:
        return Text("")
    if column.key == "verdict":
        return Text(f"{rows.SYMBOLS[cell.text]} {cell.text}", style=COLOURS[cell.text])
    text = Text(cell.short or cell.text)
    if cell.sub:
        text.append(f"\n{cell.sub}", style="dim")
    return text


def _print_answers(comparison: Comparison, console: Console) -> None:
    """Print shortened answers to one prompt (not coding, which needs its lines); the HTML page has all."""
    groups = sorted(details.side_by_side(comparison), key=lambda group: group[0].get("kind") == "coding")
    for prompt, answers in groups[:1]:
        console.print(Text(f"\n{facts.shorten(prompt.get('prompt') or '', ANSWER_LIMIT)}", style="bold"))
        for label, answer in answers:
            line = Text(f"  {label}: ", style="dim")
            line.append(facts.shorten(answer, ANSWER_LIMIT) or "(nothing)", style="not dim")
            console.print(line)
    if len(groups) > 1:
        console.print(Text(f"  ({len(groups) - 1} more in the report)", style="dim"))
