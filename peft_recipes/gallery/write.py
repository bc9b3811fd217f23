"""Write the gallery: index.html, its style and script, and a page for each report and card.

All links are relative, so that the folder can be opened from a disk or served from anywhere. gallery.json lists what
was written: a folder that has it is a gallery, and what is listed there and no longer needed is deleted. A report takes
half a second (its figures), so one that is there is kept where neither its comparison nor the package has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from peft_recipes.errors import RecipeError
from peft_recipes.gallery.cards import MOST_BYTES, card_html
from peft_recipes.gallery.collect import CARD, collect
from peft_recipes.gallery.entries import Entry, Line, entries
from peft_recipes.hardware.environment import code_version
from peft_recipes.reporting import figure_style, rows
from peft_recipes.reporting.html import SHAPES, render_html, unbroken
from peft_recipes.reporting.write import write_atomically
from peft_recipes.runs.files import check_output, make_folder

MANIFEST, MADE_BY = "gallery.json", "peft-recipes gallery"
_HERE = Path(__file__).parent
_NOTHING_THERE = " `peft-recipes compare` writes comparisons to adapters/, or to its --output."
# The columns of an entry's table on the page, of those of the report.
COLUMNS = ("metric", "difference", "verdict", "trainable_parameters", "training_seconds", "peak_memory_bytes",
           "checkpoint_bytes")  # fmt: skip


@dataclass
class Gallery:
    """What was written. `left_out`: what can't be shown, as (path below the folder, reason)."""

    output: Path
    comparisons: int = 0
    others: int = 0
    arms: int = 0
    files: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as the JSON document of --json."""
        left_out = [{"path": path, "reason": reason} for path, reason in self.left_out]
        return {"output": str(self.output), "comparisons": self.comparisons, "others": self.others, "arms": self.arms,
                "files": self.files, "left_out": left_out}  # fmt: skip


def write_gallery(
    folder: Path, output: Path, title: str = "Gallery", on_progress: Callable[[int, int], None] | None = None
) -> Gallery:
    """Write a gallery of what is below `folder` into `output`; the same input gives the same files.

    on_progress: called with the entries written and their number. Raises RecipeError where `folder` holds nothing that
    can be shown, and where `output` holds something else than a gallery.
    """
    before = _listed(output)
    found = collect(folder, without=output)
    shown = list(entries(found))
    if not shown:
        reasons = "".join(f" {path}: {reason}." for path, reason in found.left_out[:3])
        raise RecipeError(f"{folder} holds no comparison, run or adapter to show.{reasons or _NOTHING_THERE}")
    check_output(output)
    make_folder(output)
    site = _Site(output, before)
    site.mark(before["files"])
    pages = []
    for number, entry in enumerate(shown):
        pages.append(site.add(entry))
        if on_progress:
            on_progress(number + 1, len(shown))
    result = Gallery(output, sum(entry.comparison is not None for entry in shown), left_out=found.left_out)
    result.others = len(shown) - result.comparisons
    result.arms = sum(line.kind != "base" for entry in shown for line in entry.lines)
    site.write("style.css", f"{_text('../reporting/report.css')}\n{_text('gallery.css')}")
    site.write("gallery.js", _text("gallery.js"))
    site.write("index.html", _index(pages, result, title))
    site.remove_stale()
    result.files = sorted([*site.files, MANIFEST])
    return result


def _listed(output: Path) -> dict[str, Any]:
    """The gallery.json of a folder, of an empty one without files.

    Raises RecipeError where the folder holds anything else.
    """
    if (output.is_dir() and not any(output.iterdir())) or not (output.exists() or output.is_symlink()):
        return {"files": [], "reports": {}}
    try:
        data = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        assert data["made_by"] == MADE_BY
        files, reports = [PurePosixPath(name) for name in data["files"]], dict(data.get("reports") or {})
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise RecipeError(
            f"--output {output} is not empty and not a gallery, so nothing is written there. Name another folder."
        ) from None
    inside = [str(name) for name in files if not name.is_absolute() and ".." not in name.parts]
    return {"files": inside, "reports": reports}


class _Site:
    """The folder of a gallery while it is written."""

    def __init__(self, output: Path, before: dict[str, Any]):
        self.output, self.before = output, before
        self.files: set[str] = set()
        self.reports: dict[str, str] = {}  # what each report was made of, as a hash
        self._slugs: set[str] = set()

    def write(self, name: str, data: str | bytes) -> None:
        """Write a file, unless it is there already as it is."""
        content, path = data.encode() if isinstance(data, str) else data, self.output / name
        self.files.add(name)
        if not (path.is_file() and path.read_bytes() == content):
            write_atomically(path, content)

    def mark(self, names: Any) -> None:
        """Write gallery.json with these names."""
        document = {"schema": 1, "made_by": MADE_BY, "files": sorted(names), "reports": self.reports}
        write_atomically(self.output / MANIFEST, (json.dumps(document, indent=1) + "\n").encode())

    def add(self, entry: Entry) -> dict[str, Any]:
        """Write an entry's report and cards; return what the index needs: the entry, its links and its anchor."""
        slug = self._slug(entry.name if entry.name != "." else entry.title)
        report = None
        if entry.comparison is not None:
            report = f"pages/{slug}/report.html"
            self._report(report, entry.comparison)
        cards = [self._cards(entry, line, slug) for line in entry.lines]
        return {"entry": entry, "slug": slug, "report": report, "lines": list(zip(entry.lines, cards, strict=True))}

    def _report(self, name: str, comparison: dict[str, Any]) -> None:
        source = json.dumps([comparison, code_version()], sort_keys=True)
        self.reports[name] = hashlib.sha256(source.encode()).hexdigest()[:16]
        if self.before["reports"].get(name) == self.reports[name] and (self.output / name).is_file():
            self.files.add(name)
        else:
            self.write(name, render_html(comparison, home="../../index.html"))

    def _cards(self, entry: Entry, line: Line, slug: str) -> list[tuple[str, str]]:
        written = []
        for seed, folder in line.cards:
            name = f"pages/{slug}/{self._slug(f'{line.label}-{seed}' if seed else line.label, f'{slug}/')}.html"
            if (folder / CARD).stat().st_size > MOST_BYTES:
                continue
            text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
            page = _template("card.html.j2").render(
                title=f"{line.label}{f', seed {seed}' if seed else ''}", of=entry.title, home="../../index.html",
                report="report.html" if entry.comparison is not None else None,
                text=card_html(text, folder, lambda path: f"../../{self._image(path)}"),
            )  # fmt: skip
            self.write(name, page)
            written.append((seed, name))
        return written

    def _image(self, path: Path) -> str:
        """Copy an image under a name made of its content: the runs of a comparison share their figures."""
        data = path.read_bytes()
        name = f"images/{hashlib.sha256(data).hexdigest()[:16]}{path.suffix.lower()}"
        self.write(name, data)
        return name

    def _slug(self, text: str, within: str = "") -> str:
        """A name for a folder or file that is safe in an address; each name once, also where case is ignored."""
        safe = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:80] or "entry"
        name, number = safe, 1
        while within + name.casefold() in self._slugs:
            number += 1
            name = f"{safe}-{number}"
        self._slugs.add(within + name.casefold())
        return name

    def remove_stale(self) -> None:
        """Delete the files of the earlier gallery that this one lacks, and folders that are empty then."""
        for name in sorted(set(self.before["files"]) - self.files):
            path = self.output / name
            if path.is_file() and path.resolve().is_relative_to(self.output.resolve()):
                path.unlink()
                for parent in list(path.relative_to(self.output).parents)[:-1]:
                    if not any((self.output / parent).iterdir()):
                        (self.output / parent).rmdir()
        self.mark(self.files)


def _index(pages: list[dict[str, Any]], result: Gallery, title: str) -> str:
    lines = [line for page in pages for line, _ in page["lines"]]
    return _template("gallery.html.j2").render(
        title=title, pages=pages, result=result, symbols=rows.SYMBOLS, columns=COLUMNS, styles=_styles(lines),
        bases=_counted(page["entry"].base for page in pages), tasks=_counted(page["entry"].task for page in pages),
        methods=_counted(line.method for line in lines if line.method),
        verdicts=[each for each in rows.SYMBOLS if any(line.verdict == each for line in lines)],
    )  # fmt: skip


def _counted(values: Iterator[str]) -> list[str]:
    return sorted(set(values), key=lambda value: (value.casefold(), value))


def _styles(lines: list[Line]) -> dict[str, dict[str, str]]:
    """Return each method's marker: SVG path and CSS variable of its colour; full and head as in the report."""
    style = figure_style
    colours = (style.VERMILLION, style.PURPLE, style.SKY, style.ORANGE, style.GREEN, style.BLUE)
    fixed = {"Full fine-tuning": ("s", style.BLUE), "Head only": ("^", style.GREEN)}
    methods = _counted(line.method for line in lines if line.method)
    adapters = sorted((m for m in methods if m not in fixed), key=lambda method: (method != "LoRA", method.casefold()))
    look = {name: fixed[name] for name in methods if name in fixed}
    for index, name in enumerate(adapters):  # six colours; from the seventh method on each with another marker
        look[name] = ("oDvPX*"[(index + index // 6) % 6], colours[index % 6])
    return {
        name: {"path": SHAPES[marker], "colour": style.VARIABLES[colour]} for name, (marker, colour) in look.items()
    }


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(_HERE)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["unbroken"] = unbroken
    environment.filters["minus"] = lambda text: re.sub(r"(?<!\w)-(?=\d)", "\u2212", unbroken(text))
    environment.filters["figure"] = lambda value: "" if value is None else f"{value:.6g}"
    return environment.get_template(name)
