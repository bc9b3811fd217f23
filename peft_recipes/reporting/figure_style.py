"""Style of the figures and their export as PNG and SVG. Uses matplotlib without pyplot.

The colours are those of Okabe and Ito, which people with a colour vision deficiency can tell apart. Each arm also has
its own marker, line style and hatch. In the SVG of a page every colour is a CSS variable, for dark mode and print.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from peft_recipes.reporting import facts
from peft_recipes.reporting.facts import Comparison

INK, MUTED, GRID, PAPER = "#1c2127", "#5f6b7a", "#dfe3e8", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b8578f"
ORANGE, SKY, BASE = "#c78500", "#3f9fdb", "#6b7683"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card", BLUE: "--blue", VERMILLION: "--vermillion",
    GREEN: "--green", PURPLE: "--purple", ORANGE: "--orange", SKY: "--sky", BASE: "--base",
}  # fmt: skip
WIDTH, HEIGHT = 5.6, 3.9  # inches; 403 SVG units wide, about a phone's width, so that text stays readable there

_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Style:
    """How an arm is drawn in all figures."""

    colour: str
    marker: str
    line: Any
    hatch: str


def arm_styles(comparison: Comparison) -> dict[str, Style]:
    """Return one style per arm. Full and head always have the same style; adapters cycle through the others."""
    adapters = [
        (VERMILLION, "o", ""), (PURPLE, "D", "xx"), (SKY, "v", "\\\\"), (ORANGE, "P", "||"), (GREEN, "X", "++"),
        (BLUE, "*", "/"),
    ]  # fmt: skip
    styles, used = {}, 0
    for name, arm in facts.arms(comparison).items():
        if facts.is_full(name, arm):
            styles[name] = Style(BLUE, "s", "--", "//")
        elif not facts.is_peft(name, arm):
            styles[name] = Style(GREEN, "^", ":", "--")
        else:
            colour, marker, hatch = adapters[used % len(adapters)]
            styles[name] = Style(colour, marker, _LINES[(used // len(adapters) + used) % len(_LINES)], hatch)
            used += 1
    return styles


@contextlib.contextmanager
def look() -> Iterator[None]:
    """Apply our matplotlib settings while a figure is built or written, then restore the caller's."""
    import matplotlib

    settings = {
        "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
        "svg.hashsalt": "peft_recipes",  # the same comparison gives the same file
        "text.parse_math": False,  # a class named "$x$" is not a formula
        "font.family": ["DejaVu Sans"],
        "font.size": 11.5,
        "axes.edgecolor": GRID,
        "axes.linewidth": 1,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 11.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "hatch.linewidth": 0.8,
        "hatch.color": PAPER,
        "text.color": INK,
        **{f"{axis}tick.color": GRID for axis in "xy"},
        **{f"{axis}tick.labelcolor": MUTED for axis in "xy"},
        **{f"{axis}tick.labelsize": 11 for axis in "xy"},
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def canvas(width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, Any]:
    """Return an empty figure (size in inches) and its axes."""
    figure, (axes,) = panels(1, width, height)
    return figure, axes


def panels(rows: int, width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, list[Any]]:
    """Return an empty figure with axes one below the other, each of this size in inches."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, rows * height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    each = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for side in (side for axes in each for side in (axes.xaxis, axes.yaxis)):
        side.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    return figure, each


def mark(axes: Any, x: float, y: float, style: Style, size: float = 9, **options: Any) -> None:
    """Draw one marker of an arm."""
    settings = {"color": style.colour, "markersize": size, "markeredgecolor": PAPER, "zorder": 3} | options
    axes.plot([x], [y], style.marker, **settings)


def ring(axes: Any, xs: list[float], ys: list[float], size: float = 16) -> None:
    """Draw a ring around points."""
    look = {"markersize": size, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.3}
    axes.plot(xs, ys, "o", zorder=4, **look)


@dataclass
class Plot:
    """A figure with its title, caption and alt text."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Any

    def svg(self) -> str:
        """Return the figure as an SVG element for a page, with unique ids and colours as CSS variables."""
        return self._svg

    @functools.cached_property
    def _svg(self) -> str:  # the page of a comparison that is being trained is rendered again and again
        stream = io.StringIO()
        with look():
            self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        svg = stream.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
        svg, name = svg[svg.index("<svg") :], f"plot-{self.name}"
        svg = re.sub(r"<[a-zA-Z][^>]*>", lambda tag: _adapt_tag(tag.group(), name), svg)  # tags only, never text
        box = re.search(r'viewBox="[^"]*"', svg)
        head = (
            f'<svg {box.group() if box else ""} role="img" aria-labelledby="{name}-title {name}-desc">'
            f'<title id="{name}-title">{escape(self.title)}</title><desc id="{name}-desc">{escape(self.alt)}</desc>'
        )
        return re.sub(r"\n\s*", "\n", head + svg[svg.index(">") + 1 :]).strip()

    def png(self) -> bytes:
        """Return the figure as PNG on white, at twice the resolution of a screen."""
        stream = io.BytesIO()
        with look():
            self.figure.savefig(stream, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
        return stream.getvalue()


def _adapt_tag(tag: str, name: str) -> str:
    """Prefix ids and references with `name`, replace colours with CSS variables, and drop the font family."""
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#{name}-\1"', tag)
    tag = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", tag)
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var({variable}, {colour})")
    tag = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", tag)
    return re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*;?", "", tag)


def spread_out(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions by as little as possible (least squares) to be `gap` apart and within [low, high]."""
    from scipy.optimize import isotonic_regression

    if not positions:
        return []
    offsets = min(gap, (high - low) / max(1, len(positions) - 1)) * np.arange(len(positions))
    order = np.argsort(positions, kind="stable")
    spread = np.empty(len(positions))
    fitted = isotonic_regression(np.asarray(positions, dtype=float)[order] - offsets).x
    spread[order] = np.clip(fitted, low, high - offsets[-1]) + offsets
    return spread.tolist()


def label_points(
    figure: Any, axes: Any, points: list[tuple[float, float, str]], bars: Sequence[tuple[float, float, float]] = ()
) -> None:
    """Label each point (x, y, text) where the label overlaps no point, label or bar (x, low, high)."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # keep the layout that was just computed
    frame = axes.get_window_extent()
    pixels = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in pixels]
    for x, low, high in bars:
        (left, bottom), (_, top) = axes.transData.transform((x, low)), axes.transData.transform((x, high))
        taken.append((left - 6, bottom, left + 6, top))
    for (x, y, text), pixel in zip(points, pixels, strict=True):
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=11)
        extent = note.get_window_extent()
        size, best = (extent.width, extent.height), None
        for dx, dy, align in _OFFSETS:
            box = _box(pixel, dx * figure.dpi / 72, dy * figure.dpi / 72, align, size)
            cost = sum(_overlap(box, other) for other in taken) + 5 * _outside(box, frame)
            if best is None or cost < best[0]:
                best = (cost, dx, dy, align, box)
            if cost == 0:
                break
        _, dx, dy, align, box = best
        note.set(position=(dx, dy), ha=align, va="center")
        taken.append(box)


_OFFSETS = [
    (x, y, align)
    for y, x in [(0, 10), (12, 6), (-12, 6), (17, 0), (-17, 0), (24, 6), (-24, 6), (34, 4), (-34, 4)]
    for align, x in ([("left", x), ("right", -x)] if x else [("center", 0)])
]


def _box(pixel: Any, dx: float, dy: float, align: str, size: tuple[float, float]) -> tuple[float, float, float, float]:
    width, height = size
    left = pixel[0] + dx - {"left": 0, "center": width / 2, "right": width}[align]
    return left, pixel[1] + dy - height / 2, left + width, pixel[1] + dy + height / 2


def _overlap(one: tuple, other: tuple) -> float:
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: tuple, frame: Any) -> float:
    excess = (frame.x0 - box[0], box[2] - frame.x1, frame.y0 - box[1], box[3] - frame.y1)
    return 100 * sum(max(0.0, pixels) for pixels in excess)
