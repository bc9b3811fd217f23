"""What the command line prints: recipes, a plan, a run, a comparison, an adapter's answers; progress on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_recipes.reporting import facts, formats

if TYPE_CHECKING:
    from peft_recipes.adapter_checks import Finding
    from peft_recipes.comparison import Comparison
    from peft_recipes.publishing import Published
    from peft_recipes.recipe import Recipe
    from peft_recipes.reproducing import Reproduction
    from peft_recipes.runs import Run
    from peft_recipes.workers import Progress


def show_recipes(recipes: list[Recipe]) -> None:
    """Three lines a recipe."""
    console = Console(highlight=False)
    for recipe in recipes:
        console.print(f"[bold]{recipe.name}[/bold]  {escape(recipe.title)}")
        console.print(f"    {recipe.task}: {escape(recipe.model)} on {escape(recipe.dataset.path)}", soft_wrap=True)
        console.print(f"    arms: {', '.join(recipe.arms)}")
    console.print("\nTry one without a Hub: [bold]peft-recipes compare mnist-shift --embedded[/bold]")


def _trial(found: dict[str, Any]) -> str:
    whole = formats.seconds(found["estimated_seconds"]) if found["estimated_seconds"] else "?"
    return f"{whole} ({formats.seconds(found['seconds_per_step'])} a step)"


def _sent(memory: dict[str, Any]) -> str:
    sent = memory.get("traffic")
    return formats.human_bytes(sent["total"]) if sent else "-"


def show_plan(plan: dict[str, Any]) -> None:
    """A plan as a table, and the modules each arm hits."""
    console = Console(highlight=False)
    title = f"{plan['recipe']}: {plan['model']} on {plan['dataset']}"
    console.print(f"[bold]{escape(title)}[/bold]" + (" (embedded stand-ins)" if plan["embedded"] else ""))
    has = plan["hardware"]
    console.print(f"on {has['device']} ({has['device_name']}), {has['precision']}, {has['threads']} threads")
    total = next(iter(plan["arms"].values()))["total_parameters"]
    console.print(f"{total:,} parameters in the base with its task head\n")
    spread = plan.get("processes", 1) > 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm")
    tried = any("trial" in arm for arm in plan["arms"].values())
    for name in ("trains", "share", "head", "checkpoint", "steps", "tokens", "peak memory*", "rate"):
        table.add_column(name, justify="right")
    if spread:
        table.add_column("sends a step", justify="right")
    if tried:
        table.add_column("training, by a trial", justify="right")
    for name, arm in plan["arms"].items():
        table.add_row(
            name,
            f"{arm['trainable_parameters']:,}",
            f"{arm['trainable_parameters'] / arm['total_parameters']:.2%}",
            f"{arm['head_parameters']:,}" if arm["head_parameters"] else "-",
            formats.human_bytes(arm["checkpoint_bytes"]),
            "?" if arm["steps"] is None else f"{arm['steps']:,}",
            "-" if arm["tokens"] is None else f"{arm['tokens']:,}",
            formats.human_bytes(arm["memory"]["total"]) + ("" if arm["memory"]["fits"] else " does not fit"),
            f"{arm['learning_rate']:g}",
            *([_sent(arm["memory"])] if spread else []),
            *([_trial(arm["trial"])] if tried else []),
        )
    console.print(table)
    memory = next(iter(plan["arms"].values()))["memory"]
    has = f" This machine has {formats.human_bytes(memory['machine'])}." if memory["machine"] else ""
    what = "of the largest batch: weights, gradients, optimizer, activations, libraries"
    if spread:
        what = f"of one of {plan['processes']} processes ({plan['distributed']}), its own batch and buffers"
        has = f" Each has {formats.human_bytes(memory['machine'])}." if memory["machine"] else ""
    console.print(f"* estimated, {what}.{has}\n")
    for name, arm in plan["arms"].items():
        modules = arm["modules"]
        console.print(f"{name} learns in {len(modules)} module{'s' * (len(modules) != 1)}: {escape(_few(modules))}")
    for note in plan["notes"]:
        console.print(f"Note: {escape(note)}")


def _few(modules: list[str], most: int = 4) -> str:
    shown = ", ".join(modules[:most])
    return shown if len(modules) <= most else f"{shown}, ... {modules[-1]}"


def show_methods(table: dict[str, Any]) -> None:
    """The table of methods, a few lines a method."""
    console = Console(highlight=False)
    for row in table["methods"]:
        merged = "" if row["merges"] else ", can't be merged"
        console.print(f"[bold]{row['name']}[/bold]  {escape(row['title'])}: rate {row['learning_rate']:g}{merged}")
        options = {**row["options"], **row["arm"]}
        said = ", ".join(f"{key}={value}" for key, value in options.items())
        console.print(f"    {row['config']}({escape(said)}): {escape(row['defaults'])}", soft_wrap=True)
        if row["cannot"]:
            console.print(f"    can't: {escape('; '.join(row['cannot']))}", soft_wrap=True)
        where = f", arXiv:{row['arxiv']}" if row["arxiv"] else ""
        console.print(f"    [dim]{escape(row['paper'])}{where}[/dim]", soft_wrap=True)
    left_out = table["left_out"]
    for why in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, reason in left_out.items() if reason == why)
        console.print(f"not here: {names}: {escape(why)}", soft_wrap=True)
    console.print("\nOn any recipe: [bold]peft-recipes compare RECIPE --arms full,lora,dora[/bold], or --arms all")


def show_run(run: Run) -> None:
    """A run's metrics, costs and folder."""
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
    if data["embedded"]:
        console.print("  Measured on embedded stand-ins, not on the recipe's own model and data.")
    console.print(f"  {escape(str(run.folder))}")


def show_findings(found: list[Finding]) -> None:
    """The checks of an adapter, a line each."""
    console = Console()
    for finding in found:
        mark = {True: "[green]ok  [/]", False: "[bold red]FAIL[/]", None: "[dim]-   [/]"}[finding.ok]
        console.print(f"{mark} {finding.name:13} {escape(finding.said)}", highlight=False, soft_wrap=True)


def show_parcel(made: Published) -> None:
    """What a push will send, before it does."""
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
    """What came of a push."""
    console = Console(highlight=False)
    if dry_run:
        console.print("A dry run: its checks are done, nothing was sent, and the Hub was not asked.")
    for one in made:
        if one.commit:
            console.print(f"Sent to {one.url} (commit {one.commit[:12]})", soft_wrap=True)


def show_reproduction(made: Reproduction) -> None:
    """Each figure beside its evidence, what differs here, and whether it held."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure")
    for name in ("evidence", "here", "has to lie in"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in made.rows:
        between = "-" if row.bounds is None else f"{row.bounds[0]:.6g} to {row.bounds[1]:.6g}"
        mark = {True: "[green]holds[/]", False: "[bold red]DOES NOT[/]", None: "[dim]not asked[/]"}[row.held]
        figures = ("-" if value is None else f"{value:.6g}" for value in (row.evidence, row.here))
        table.add_row(escape(f"{row.split} {row.metric}"), *figures, between, mark)
    console.print(f"[bold]{escape(made.adapter)}[/bold]: {escape(made.arm)}, seed {made.seed}, trained again here")
    console.print(table)
    if made.differs:
        console.print("Held to the 95 % interval of its own test examples, since the conditions differ:")
        for line in made.differs:
            console.print(f"  {escape(line)}", soft_wrap=True)
    else:
        console.print("Held to be equal up to float noise: the same kind of machine, versions, threads and data.")
    for doubt in made.doubts:
        console.print(f"[bold red]Doubt:[/] {escape(doubt)}", soft_wrap=True)
    if made.folder is not None:
        console.print(f"The new run is in {escape(str(made.folder))}", soft_wrap=True)
    console.print("[bold]Reproduced.[/]" if made.held else "[bold red]Not reproduced.[/]")


def show_comparison(comparison: Comparison) -> None:
    """The table, the verdict, and where the report is."""
    from peft_recipes.reporting import render_terminal

    console = Console()
    render_terminal(comparison.data, console)
    console.print(f"\nReport: {comparison.folder / 'comparison.html'}", soft_wrap=True, highlight=False)


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: a bar in a terminal, one line a finished run elsewhere."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield lambda news: _print_end(console, news)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        runs = bars.add_task("preparing", total=None)
        under_way: dict[tuple[str, int], Any] = {}

        def tell(news: Progress) -> None:
            _print_end(bars.console, news)
            arm, seed = news.job
            bars.update(runs, total=news.jobs, advance=news.state != "running", description="runs")
            if news.state != "running":
                if news.job in under_way:
                    bars.remove_task(under_way.pop(news.job))
                return
            if news.job not in under_way:
                under_way[news.job] = bars.add_task("", total=None)
            silent = f" · silent for {news.silent_seconds // 60} min" if news.silent_seconds else ""
            bars.update(
                under_way[news.job],
                description=f"{arm} · seed {seed} · {news.stage or 'start'}{silent}",
                total=news.steps or None,
                completed=news.step,
            )

        yield tell


def _print_end(console: Console, news: Progress) -> None:
    if news.state == "running":
        return
    arm, seed = news.job
    words = {"ok": "done", "kept": "kept from before"}.get(news.state, news.state)
    reason = f": {escape(news.error)}" if news.error else ""
    console.print(f"{news.number}/{news.jobs} {arm} seed {seed}: {words}{reason}", highlight=False)


def show_predictions(names: list[str], found: list[dict[str, Any]]) -> None:
    """One line a text or image: label, probability, and what it was."""
    console = Console(highlight=False)
    width = max(len(result["label"]) for result in found)
    for name, result in zip(names, found, strict=True):
        said = escape(facts.shorten(name, max(console.width - width - 12, 20)))
        console.print(f"[bold]{escape(result['label']):{width}}[/]  {result['probability']:6.1%}  [dim]{said}[/]",
                      soft_wrap=True)  # fmt: skip


def show_answers(rows: list[dict[str, Any]]) -> None:
    """Each prompt, and below it what each form answered, and how fast."""
    console = Console(highlight=False)
    for row in rows:
        console.print(f"\n[bold]{escape(facts.plain(row['prompt']))}[/]")
        for form, made in row["answers"].items():
            speed = f"{made['tokens']} tokens, {made['tokens_per_second']:.1f} tokens/s"
            console.print(f"\n[cyan]{escape(form)}[/]  [dim]{speed}[/]")
            for line in (made["text"] or "(nothing)").split("\n"):
                console.print(escape(facts.plain(line)), soft_wrap=True)


def show_merge(made: dict[str, Any], output: Path) -> None:
    """What merging changed, and where the model is."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(made['adapter'])}[/] ({made['method']}) merged into {escape(made['base'])}")
    inputs = made["inputs"]
    console.print(
        f"  largest logit difference {made['largest_logit_difference']:.2g} ({made['share_of_outputs']:.1g} of their "
        f"size) on {inputs['count']} inputs ({inputs['source']})",
        soft_wrap=True,
    )
    if moved := made["dequantised"]:
        console.print(f"  the base was {moved['from']}: its full weights move the logits by "
                      f"{moved['largest_logit_difference']:.2g} ({moved['share_of_outputs']:.1g} of their size)",
                      soft_wrap=True)  # fmt: skip
    if made["before"]:
        for name, value in made["before"].items():
            console.print(f"  test {name}: {value:.4f} before, {made['after'][name]:.4f} merged")
    for note in made["notes"]:
        console.print(f"  Note: {escape(note)}", soft_wrap=True)
    console.print(f"  {escape(str(output))}", soft_wrap=True)


def show_combination(made: dict[str, Any], output: Path) -> None:
    """Each test set: the base, the adapter that it belongs to, the combination."""
    console = Console(highlight=False)
    weights = ", ".join(f"{name} {weight:g}" for name, weight in made["weights"].items())
    console.print(f"[bold]{made['method']}[/] of {escape(weights)} on {escape(made['base'])}, rank {made['rank']}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("test set of", "metric", "base", "own adapter", "combined"):
        table.add_column(name, justify="left" if name in ("test set of", "metric") else "right")
    for name, found in made["test_sets"].items():
        if found["metric"] is None:
            table.add_row(name, "-", "-", "-", "-")
            continue
        values = [(found[form] or {}).get(found["metric"]) for form in ("base", "own", "combined")]
        table.add_row(name, found["metric"], *("-" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    for name, found in made["test_sets"].items():
        if found.get("note"):
            console.print(f"  {escape(name)}: {found['note']}")
    console.print(f"  {escape(str(output))}", soft_wrap=True)


@contextlib.contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that counts to its end; nothing where stderr is no terminal."""
    from tqdm.auto import tqdm

    with tqdm(unit=f" {what}", disable=not sys.stderr.isatty()) as bar:

        def tell(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield tell


def line_reader() -> Callable[[str], str]:
    """`input`, with a history and editing of the line where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    return input
