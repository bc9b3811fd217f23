"""Console output for runs, comparisons, checks, pushes and reproductions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_recipes.reporting import formats

if TYPE_CHECKING:
    from peft_recipes.adapters.check import Finding
    from peft_recipes.comparison.comparison import Comparison
    from peft_recipes.gallery.write import Gallery
    from peft_recipes.publishing.push import Published
    from peft_recipes.publishing.reproduce import Reproduction
    from peft_recipes.runs.folder import Run


def show_run(run: Run) -> None:
    """Print a run's metrics, costs and folder."""
    data, console = run.data, Console()
    console.print(f"[bold]{data['recipe']} · {data['arm']} · seed {data['seed']}[/bold]")
    for split, metrics in data["metrics"].items():
        console.print(f"  {split}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if training := data["training"]:
        tokens = training["tokens_per_second"]
        speed = f"{tokens:.1f} tokens/s" if tokens else f"{training['examples_per_second']:.1f} examples/s"
        console.print(
            f"  {training['steps']} steps, {formats.seconds(training['seconds'])} of training, {speed}, "
            f"peak memory {formats.human_bytes(training['peak_memory_bytes'])}, "
            f"checkpoint {formats.human_bytes(data['checkpoint_bytes'])}"
        )
    for name, words in run.failed_checks.items():
        console.print(f"  [bold red]FAIL[/] {escape(f'{name}: {words}')}", highlight=False, soft_wrap=True)
    if data["embedded"]:
        console.print("  Measured on embedded stand-ins, not on the recipe's own model and data.")
    console.print(f"  {escape(str(run.folder))}")


def show_findings(findings: list[Finding]) -> None:
    """Print the checks of an adapter, one per line."""
    console = Console()
    for finding in findings:
        mark = {True: "[green]ok  [/]", False: "[bold red]FAIL[/]", None: "[dim]-   [/]"}[finding.ok]
        console.print(f"{mark} {finding.name:13} {escape(finding.message)}", highlight=False, soft_wrap=True)


def show_upload(made: Published) -> None:
    """Print what a push will upload."""
    console = Console(highlight=False)
    kind = "private" if made.private else "public"
    console.print(f"[bold]{made.repo_id}[/bold] ({kind}): {len(made.files)} files, {formats.human_bytes(made.bytes)}")
    for path, size in made.files.items():
        console.print(f"  {formats.human_bytes(size):>8}  {escape(path)}", soft_wrap=True)
    for path in made.removed:
        console.print(f"   removed  {escape(path)}", soft_wrap=True)
    for path, why in made.left_out.items():
        console.print(f"[dim]stays here  {escape(path)}: {escape(why)}[/dim]", soft_wrap=True)
    for note in made.told:
        console.print(f"Note: {escape(note)}", soft_wrap=True)


def show_published(made: list[Published], dry_run: bool) -> None:
    """Print the commits of a push."""
    console = Console(highlight=False)
    if dry_run:
        console.print("A dry run: the checks passed; nothing was pushed, and the Hub was not contacted.")
    for one in made:
        if one.commit:
            console.print(f"Sent to {one.url} (commit {one.commit[:12]})", soft_wrap=True)


def show_reproduction(made: Reproduction) -> None:
    """Print each metric next to its evidence, the conditions that differ, and whether it was reproduced."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure")
    for name in ("evidence", "here", "expected range"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in made.rows:
        between = "-" if row.bounds is None else f"{row.bounds[0]:.6g} to {row.bounds[1]:.6g}"
        mark = {True: "[green]holds[/]", False: "[bold red]DOES NOT[/]", None: "[dim]not checked[/]"}[row.held]
        figures = ("-" if value is None else f"{value:.6g}" for value in (row.evidence, row.here))
        table.add_row(escape(f"{row.split} {row.metric}"), *figures, between, mark)
    console.print(f"[bold]{escape(made.adapter)}[/bold]: {escape(made.arm)}, seed {made.seed}, rerun here")
    console.print(table)
    if made.differs:
        console.print("Compared within the 95 % interval of its own test examples, since the conditions differ:")
        for line in made.differs:
            console.print(f"  {escape(line)}", soft_wrap=True)
    else:
        console.print("Compared for equality up to float noise: the same kind of machine, versions, threads and data.")
    for doubt in made.doubts:
        console.print(f"[bold red]Doubt:[/] {escape(doubt)}", soft_wrap=True)
    if made.folder is not None:
        console.print(f"The new run is in {escape(str(made.folder))}", soft_wrap=True)
    console.print("[bold]Reproduced.[/]" if made.held else "[bold red]Not reproduced.[/]")


def show_comparison(comparison: Comparison) -> None:
    """Print the table, the verdicts and the path of the report."""
    from peft_recipes.reporting.terminal import render_terminal

    console = Console()
    render_terminal(comparison.data, console)
    console.print(f"\nReport: {comparison.folder / 'comparison.html'}", soft_wrap=True, highlight=False)


def show_gallery(written: Gallery) -> None:
    """Print where a gallery is, what it holds and what was left out."""
    console = Console(highlight=False)
    counts = [(written.comparisons, "comparison", "comparisons"), (written.others, "other entry", "other entries")]
    parts = [f"{count} {one if count == 1 else more}" for count, one, more in counts if count]
    console.print(f"{escape(str(written.output / 'index.html'))}: {formats.listed(parts)}", soft_wrap=True)
    for path, reason in written.left_out:
        console.print(f"[dim]left out  {escape(path)}: {escape(reason)}[/dim]", soft_wrap=True)
