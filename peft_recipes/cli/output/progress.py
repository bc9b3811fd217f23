"""Progress on stderr, and the line that a user types; the terminal alone is written to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from peft_recipes.comparison.pool import Progress


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
