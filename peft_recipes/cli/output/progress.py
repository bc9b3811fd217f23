"""Progress bars on stderr, and the input line of a chat."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.table import Table

    from peft_recipes.comparison.orders import Progress as RunProgress

_UNDER_WAY = ("pending", "running", "paused")  # any other state is the end of a run


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[RunProgress], None]]:
    """Show a comparison's progress on stderr: bars and a table of arms in a terminal, a line per finished run."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield lambda progress: _print_end(console, progress)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    standings = Standings()

    class Bars(Progress):
        def get_renderables(self) -> Iterator[Any]:
            if standings.arms:
                yield standings.table()
            yield self.make_tasks_table(self.tasks)

    with Bars(*columns, console=console, transient=True) as bars:
        runs = bars.add_task("preparing", total=None)
        under_way: dict[tuple[str, int], Any] = {}

        def update(progress: RunProgress) -> None:
            _print_end(bars.console, progress)
            standings.see(progress)
            arm, seed = progress.job
            bars.update(runs, total=progress.jobs, advance=progress.state not in _UNDER_WAY, description="runs")
            if progress.state != "running":
                if progress.job in under_way:
                    bars.remove_task(under_way.pop(progress.job))
                return
            if progress.job not in under_way:
                under_way[progress.job] = bars.add_task("", total=None)
            silent = f" · silent for {progress.silent_seconds // 60} min" if progress.silent_seconds else ""
            bars.update(
                under_way[progress.job],
                description=f"{arm} · seed {seed} · {progress.stage or 'start'}{silent}",
                total=progress.steps or None,
                completed=progress.step,
            )

        yield update


@contextlib.contextmanager
def progress_bar(of: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on stderr in a terminal: yields a function of how many are done and how many there are."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(of, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _print_end(console: Console, progress: RunProgress) -> None:
    if progress.note:
        console.print(f"{progress.job[0]} seed {progress.job[1]}: {escape(progress.note)}", highlight=False)
    if progress.state in _UNDER_WAY:
        return
    arm, seed = progress.job
    words = {"ok": "done", "kept": "kept from before"}.get(progress.state, progress.state)
    reason = f": {escape(progress.error)}" if progress.error else ""
    test = ""
    if progress.test is not None:
        from peft_recipes.reporting import formats

        test = f", test {formats.metric_title(progress.metric)} {formats.quality(progress.test, progress.metric)}"
    console.print(f"{progress.number}/{progress.jobs} {arm} seed {seed}: {words}{test}{reason}", highlight=False)


class Standings:
    """What is known of each arm while the others are trained: finished seeds, mean test and validation metrics.

    Validation of an arm without a finished seed: of its paused runs so far.
    """

    def __init__(self) -> None:
        self.arms: dict[str, dict[str, dict[int, float | None]]] = {}
        self._metrics = ("", "")

    def see(self, progress: RunProgress) -> None:
        """Take down what a report of a finished or paused run says."""
        (name, seed), values = progress.job, {"test": progress.test, "validation": progress.validation}
        if not progress.metric or values == {"test": None, "validation": None}:
            return
        self._metrics = (progress.metric, progress.selection_metric)
        arm = self.arms.setdefault(name, {"test": {}, "validation": {}, "paused": {}})
        if progress.state == "paused":
            values = {"paused": progress.validation}
        for column, value in values.items():
            arm[column] |= {} if value is None else {seed: value}

    def table(self) -> Table:
        """The arms in the order in which their first values came."""
        from rich.table import Table

        from peft_recipes.reporting import formats

        metric, selection = self._metrics
        made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        made.add_column("arm")
        titles = f"test {formats.metric_title(metric)}", f"validation {formats.metric_title(selection)}"
        for title in ("seeds", *titles):
            made.add_column(title, justify="right")
        for name, arm in self.arms.items():
            pairs = ((arm["test"], metric), (arm["validation"] or arm["paused"], selection))
            means = (formats.quality(statistics.fmean(v.values()) if v else None, m) for v, m in pairs)
            made.add_row(escape(name), str(len(arm["test"])), *means)
        return made


@contextlib.contextmanager
def counter(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a counting bar on stderr; nothing if stderr is no terminal."""
    from tqdm.auto import tqdm

    with tqdm(unit=f" {what}", disable=not sys.stderr.isatty()) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def line_reader() -> Callable[[str], str]:
    """`input` with line editing and a history, if the system has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    return input
