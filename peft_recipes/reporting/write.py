"""The report of a comparison: in the terminal, as Markdown, and as one self-contained HTML page.

Everything is drawn from the `comparison` dict alone (DESIGN.md, section 5), so a report can be made again from
comparison.json. matplotlib, jinja2 and rich are imported when something is rendered.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PLOTS = "plots"  # the Markdown's images, in a folder beside it


def write_reports(comparison: dict[str, Any], folder: Path) -> list[Path]:
    """Write comparison.md, comparison.html and plots/*.png into `folder`; returns the paths, the two reports first.

    Each file is written beside its place and renamed into it, so a reader never sees half a report. Figures of an
    earlier report that this comparison has no data for are removed. Raises OSError where `folder` can't be written.
    """
    from peft_recipes.reporting.html import render_html
    from peft_recipes.reporting.markdown import render_markdown
    from peft_recipes.reporting.plots import plots, sample_sheet

    folder = Path(folder)
    figures = plots(comparison)
    sheet = sample_sheet(comparison)
    images = [*figures, sheet] if sheet else figures
    written = []
    for plot in images:
        written.append(write_atomically(folder / PLOTS / f"{plot.name}.png", plot.png()))
    _remove_stale(folder / PLOTS, {path.name for path in written})
    shown = [(plot.title, plot.caption, plot.alt, f"{PLOTS}/{plot.name}.png") for plot in images]
    markdown = write_atomically(folder / "comparison.md", render_markdown(comparison, shown).encode())
    page = write_atomically(folder / "comparison.html", render_html(comparison, figures).encode())
    return [markdown, page, *written]


def render_terminal(comparison: dict[str, Any], console: Console) -> None:
    """Print the comparison to a rich console."""
    from peft_recipes.reporting.terminal import render_terminal as render

    render(comparison, console)


def write_atomically(path: Path, data: bytes) -> Path:
    """Write `data` beside `path` and rename it into place; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_stale(folder: Path, current: set[str]) -> None:
    from peft_recipes.reporting.plots import NAMES

    for name in NAMES:
        if f"{name}.png" not in current:
            (folder / f"{name}.png").unlink(missing_ok=True)
