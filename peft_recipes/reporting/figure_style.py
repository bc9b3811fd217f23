"""How figures look, and how they are written: matplotlib without pyplot, one look for PNG, page, dark mode and print.

Colours are Okabe and Ito's (told apart by people who don't tell red from green), and never alone: each arm has its
marker, line style and hatch as well. In a page's SVG every colour becomes a CSS variable,
so that dark mode can brighten it.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from peft_recipes.reporting import facts
from peft_recipes.reporting.facts import Comparison

INK, MUTED, GRID, PAPER = "#1c2127", "#5f6b7a", "#dfe3e8", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BASE = (
    "#0072b2", "#d55e00", "#009e73", "#b8578f", "#c78500", "#3f9fdb", "#6b7683",
)  # fmt: skip
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card", BLUE: "--blue", VERMILLION: "--vermillion",
    GREEN: "--green", PURPLE: "--purple", ORANGE: "--orange", SKY: "--sky", BASE: "--base",
}  # fmt: skip
WIDTH, HEIGHT = (
    5.6,
    3.9,
)  # inches; 72 to the inch gives 403 units, near a phone's width, so that text stays readable there

_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Style:
    """How one arm is drawn everywhere: colour, marker, line and hatch."""

    colour: str
    marker: str
    line: Any
    hatch: str


def arm_styles(comparison: Comparison) -> dict[str, Style]:
    """One style an arm. Full and head keep theirs in every report; adapters take the others in turn."""
    others = [
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
            colour, marker, hatch = others[used % len(others)]
            styles[name] = Style(colour, marker, _LINES[(used // len(others) + used) % len(_LINES)], hatch)
            used += 1
    return styles


@contextlib.contextmanager
def look() -> Iterator[None]:
    """matplotlib's settings while a figure is built or written; the caller's own come back afterwards."""
    import matplotlib

    settings = {
        "svg.fonttype": "none",  # text stays text: the page's font, selectable, small
        "svg.hashsalt": "peft_recipes",  # the same comparison gives the same file
        "text.parse_math": False,  # a class called "$x$" is no formula, and "$(" no error
        "text.usetex": False,
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
        "figure.autolayout": False,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "hatch.linewidth": 0.8,
        "hatch.color": PAPER,
        "text.color": INK,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def canvas(width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, Any]:
    """An empty figure (inches) and its axes. No pyplot: nothing is shared with the caller's own figures."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    axes = figure.add_subplot()
    for side in (axes.xaxis, axes.yaxis):
        side.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    return figure, axes


@dataclass
class Plot:
    """A figure with its words: `alt` says what is to be seen, for those who can't see it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Any

    def svg(self) -> str:
        """An SVG element to inline in a page."""
        return to_svg(self.figure, f"plot-{self.name}", self.title, self.alt)

    def png(self) -> bytes:
        """A PNG on white paper."""
        return to_png(self.figure)


def to_png(figure: Any) -> bytes:
    """The figure on white paper at twice a screen's resolution."""
    stream = io.BytesIO()
    with look():
        figure.savefig(stream, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
    return stream.getvalue()


def to_svg(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as an SVG element for a page: no prolog, no address, ids of its own, colours as CSS variables."""
    stream = io.StringIO()
    with look():
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _own_ids(svg, name)
    svg = _themed(svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg {box.group() if box else ""} role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    return re.sub(r"\n\s*", "\n", head + svg[svg.index(">") + 1 :]).strip()


def _own_ids(svg: str, name: str) -> str:
    """Prefix ids and what points at them: several figures share one page. Only inside tags, never in text."""

    def tag(found: re.Match) -> str:
        text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', found.group())
        text = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#{name}-\1"', text)
        return re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)

    return re.sub(r"<[a-zA-Z][^>]*>", tag, svg)


def _themed(svg: str) -> str:
    """Colours to CSS variables and the font to the page's. Only inside tags, never in text."""

    def tag(found: re.Match) -> str:
        text = found.group()
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var({variable}, {colour})")
        text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
        return re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*;?", "", text)

    return re.sub(r"<[a-zA-Z][^>]*>", tag, svg)


def spread_out(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move `positions` on a line as little as needed so that neighbours are `gap` apart and all lie in [low, high]."""
    if not positions:
        return []
    gap = min(gap, (high - low) / max(1, len(positions) - 1)) if len(positions) > 1 else gap
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [min(max(positions[index], low), high) for index in order]
    for _ in range(200):
        moved = False
        for left in range(len(placed) - 1):
            overlap = gap - (placed[left + 1] - placed[left])
            if overlap > 1e-9:
                placed[left] -= overlap / 2
                placed[left + 1] += overlap / 2
                moved = True
        shift_up, shift_down = max(0.0, low - placed[0]), max(0.0, placed[-1] - high)
        placed = [min(max(value, low), high) for value in (p + shift_up - shift_down for p in placed)]
        if not moved:
            break
    result = [0.0] * len(positions)
    for index, value in zip(order, placed, strict=True):
        result[index] = value
    return result


def label_points(
    figure: Any, axes: Any, points: list[tuple[float, float, str]], bars: Sequence[tuple[float, float, float]] = ()
) -> None:
    """Write a name beside each point (x, y, text), where it covers no point, name or bar (x, low, high)."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # keep the places that were just found
    frame = axes.get_window_extent()
    spots = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    for x, low, high in bars:
        (left, bottom), (_, top) = axes.transData.transform((x, low)), axes.transData.transform((x, high))
        taken.append((left - 6, bottom, left + 6, top))
    for (x, y, text), spot in zip(points, spots, strict=True):
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=11)
        extent = note.get_window_extent()
        size, best = (extent.width, extent.height), None
        for dx, dy, align in _OFFSETS:
            box = _box(spot, dx * figure.dpi / 72, dy * figure.dpi / 72, align, size)
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


def _box(spot: Any, dx: float, dy: float, align: str, size: tuple[float, float]) -> tuple[float, float, float, float]:
    width, height = size
    left = spot[0] + dx - {"left": 0, "center": width / 2, "right": width}[align]
    return left, spot[1] + dy - height / 2, left + width, spot[1] + dy + height / 2


def _overlap(one: tuple, other: tuple) -> float:
    wide, high = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: tuple, frame: Any) -> float:
    return (
        sum(max(0.0, over) for over in (frame.x0 - box[0], box[2] - frame.x1, frame.y0 - box[1], box[3] - frame.y1))
        * 100
    )
