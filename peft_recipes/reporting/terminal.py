"""The report in the terminal: verdict, table, what was forgotten, what to try next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_recipes.reporting import advice, details, facts, rank_sentences, rows, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COLOURS = {"equivalent": "green", "better": "blue", "worse": "yellow", "not shown": "bright_black"}
ANSWER_LIMIT = 220


def render_terminal(comparison: Comparison, console: Console) -> None:
    """Print the comparison to a rich console. Nothing from outside is read as markup or as a control sequence."""
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.text import Text

    console.print(Padding(_title(comparison), (1, 0, 0, 0)))
    name = sentences.headline_arm(comparison)
    if name is not None:
        told = sentences.describe_difference(comparison, name)
        colour = COLOURS[told.verdict] if told else "bright_black"
        body = Text(sentences.verdict_headline(comparison, name))
        for caveat in sentences.caveats(comparison, name):
            body.append(f"\n{caveat}", style="dim")
        console.print(Panel(body, border_style=colour, title=_chip(told), title_align="left", padding=(0, 1)))
    found = rows.table(comparison)
    columns = _fitting(found, console.width)
    console.print()
    console.print(_table(found, columns))
    told_below = ("split:", "latency_ms")
    left_out = [column for column in found.columns if column not in columns and not column.key.startswith(told_below)]
    if left_out:
        missing = ", ".join(column.short or column.title for column in left_out)
        console.print(Text(f"(no room here for {missing}: they are in the report)", style="dim"))
    for row in found.rows:
        if row.kind == "failed":
            console.print(Text(f"✗ {row.label}: {row.reason}", style="red"))
    for line in rank_sentences.rank_lines(comparison):
        console.print(Text(line))
    if not any(column.key.startswith("split:") for column in columns):
        for line in sentences.forgetting(comparison):
            console.print(Text(line))
    if not any(column.key == "latency_ms" for column in columns) and (line := sentences.latency(comparison)):
        console.print(Text(line))
    _print_answers(comparison, console)
    _print_steps(advice.next_steps(comparison), console)


def _print_steps(steps: list[str], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if not steps:
        return
    console.print(Text("\nWhat to try next", style="bold"))
    lines = Table.grid(padding=(0, 1))
    for step in steps:
        lines.add_row("-", _with_commands(step))
    console.print(lines)


def _title(comparison: Comparison) -> Text:
    from rich.text import Text

    title = Text(facts.plain(comparison.get("recipe", "comparison")), style="bold")
    if comparison.get("title"):
        title.append(f"  {facts.plain(comparison['title'])}", style="not bold")
    if comparison.get("embedded"):
        title.append("  embedded stand-ins", style="not bold yellow")
    return title


def _chip(told: sentences.Difference | None) -> str | None:
    return f"{rows.SYMBOLS[told.verdict]} {told.verdict}" if told else None


def _fitting(found: rows.Table, width: int) -> list[rows.Column]:
    """The columns that fit into `width` characters whole, the most important first; at least the first."""
    room = width - max((len(_label(row)) for row in found.rows), default=3) - 1
    kept: list[rows.Column] = []
    for column in sorted(found.columns, key=lambda column: column.priority):
        room -= _width(found, column) + 3
        if room < 0 and kept:
            break
        kept.append(column)
    return [column for column in found.columns if column in kept]


def _width(found: rows.Table, column: rows.Column) -> int:
    """The widest line of a column's cells, or the longest word of its heading."""
    cells = [_cell(row, column).plain for row in found.rows]
    lines = [line for cell in cells for line in cell.split("\n")] + (column.short or column.title).split()
    return max(len(line) for line in lines)


def _table(found: rows.Table, columns: list[rows.Column]) -> object:
    import textwrap

    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1))
    shown.add_column("Arm", no_wrap=True)
    for column in columns:
        heading = textwrap.fill(column.short or column.title, _width(found, column))
        shown.add_column(Text(heading), justify="left" if column.key == "verdict" else "right", no_wrap=True)
    for row in found.rows:
        label = Text(_label(row), style="dim" if row.kind == "base" else "")
        shown.add_row(label, *[_cell(row, column) for column in columns])
    return shown


def _label(row: rows.Row) -> str:
    return facts.shorten(row.label, 26)


def _cell(row: rows.Row, column: rows.Column) -> Text:
    """A cell's text, its second line dim. A failed row says so in the verdict's place; why stands below the table."""
    from rich.text import Text

    cell = row.cells.get(column.key)
    if row.kind == "failed" and column.key == "verdict":
        return Text("✗ " + row.reason.split(":")[0][:14], style="red")
    if cell is None or cell.text == fmt.NOTHING:
        return Text("")
    if column.key == "verdict":
        return Text(f"{rows.SYMBOLS[cell.text]} {cell.text}", style=COLOURS[cell.text])
    text = Text(cell.text)
    if cell.sub:
        text.append(f"\n{cell.sub}", style="dim")
    return text


def _print_answers(comparison: Comparison, console: Console) -> None:
    """One prompt's answers, cut (not the coding one: it needs its lines); the HTML page has all of them, whole."""
    from rich.text import Text

    groups = sorted(details.side_by_side(comparison), key=lambda group: group[0].get("kind") == "coding")
    for prompt, found in groups[:1]:
        console.print(Text(f"\n{facts.shorten(prompt.get('prompt') or '', ANSWER_LIMIT)}", style="bold"))
        for label, answer in found:
            line = Text(f"  {label}: ", style="dim")
            line.append(facts.shorten(answer, ANSWER_LIMIT) or "(nothing)", style="not dim")
            console.print(line)
    if len(groups) > 1:
        console.print(Text(f"  ({len(groups) - 1} more in the report)", style="dim"))


def _with_commands(step: str) -> Text:
    from rich.text import Text

    text, pieces = Text(), sentences.code_spans(step)
    if len(pieces) > 1 and pieces[-2][0] and pieces[-1] == (False, "."):
        pieces.pop()  # a command at the end is copied without its sentence's full stop
    for is_code, piece in pieces:
        text.append(piece, style="cyan" if is_code else "")
    return text
