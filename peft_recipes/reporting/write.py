"""Write the reports of a comparison: Markdown with plots, and one self-contained HTML page.

Everything is rendered from the contents of comparison.json (docs/concepts/file-formats.md), so a report can be
rendered again later. matplotlib, jinja2 and rich are imported only when something is rendered.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PLOTS = "plots"  # the folder of the Markdown's images


def write_reports(comparison: dict[str, Any], folder: Path) -> list[Path]:
    """Write comparison.md, comparison.html and plots/*.png into `folder`; return the paths, the two reports first.

    Writes are atomic, so a reader never sees half a report. Plots of an earlier report that this comparison has no
    data for are removed. A provisional comparison gets no PNG plots. Raises OSError where `folder` can't be written.
    """
    from peft_recipes.reporting.html import render_html
    from peft_recipes.reporting.markdown import render_markdown
    from peft_recipes.reporting.plots import NAMES, plots, sample_sheet

    if comparison.get("provisional"):
        return write_pages(comparison, Path(folder), provisional_plots(comparison))
    folder, figures, sheet = Path(folder), plots(comparison), sample_sheet(comparison)
    images = [*figures, sheet] if sheet else figures
    written = [write_atomically(folder / PLOTS / f"{plot.name}.png", plot.png()) for plot in images]
    for name in set(NAMES) - {plot.name for plot in images}:
        (folder / PLOTS / f"{name}.png").unlink(missing_ok=True)
    shown = [(plot.title, plot.caption, plot.alt, f"{PLOTS}/{plot.name}.png") for plot in images]
    markdown = write_atomically(folder / "comparison.md", render_markdown(comparison, shown).encode())
    page = write_atomically(folder / "comparison.html", render_html(comparison, figures).encode())
    return [markdown, page, *written]


def write_pages(comparison: dict[str, Any], folder: Path, figures: list[Any]) -> list[Path]:
    """Write comparison.md, without images, and comparison.html with these plots; return the paths."""
    from peft_recipes.reporting.html import render_html
    from peft_recipes.reporting.markdown import render_markdown

    page = write_atomically(folder / "comparison.html", render_html(comparison, figures).encode())
    return [write_atomically(folder / "comparison.md", render_markdown(comparison).encode()), page]


def provisional_plots(comparison: dict[str, Any]) -> list[Any]:
    """Return the plots of a provisional comparison; before the first curve there are none, and nothing is imported."""
    if not any(
        arm.get("curves") or (arm.get("progress") or {}).get("validation") for arm in comparison["arms"].values()
    ):
        return []
    from peft_recipes.reporting.plots import plots

    return plots(comparison)


def write_atomically(path: Path, data: bytes) -> Path:
    """Write `data` to a temporary file next to `path` and rename it; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
