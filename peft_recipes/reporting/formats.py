"""Format numbers for people. Tables, sentences and plots all use these functions, so that they agree."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from peft_recipes.recipe.metrics import METRICS
from peft_recipes.reporting.facts import number

NOTHING = "-"
_SHARES = ("accuracy", "f1", "precision", "recall", "exact_match")  # parts of the names of metrics not in the table


def is_share(metric: str) -> bool:
    """Return whether the metric is a fraction, shown in percent and its differences in points."""
    known = METRICS.get(metric)
    return known.share if known else any(part in metric for part in _SHARES)


def metric_title(metric: str) -> str:
    """Return the metric's name in running text: "accuracy", "macro F1"."""
    return METRICS[metric].title if metric in METRICS else metric.replace("_", " ")


def capitalized(text: str) -> str:
    """Return `text` with a capital first letter, the others as they are: "Macro F1", "ROUGE-L"."""
    return text[:1].upper() + text[1:]


def _or_nothing(show: Callable[..., str]) -> Callable[..., str]:
    """Make a format show `NOTHING` for a value that is missing or not finite."""

    @functools.wraps(show)
    def safe(value: Any, *args: Any, **options: Any) -> str:
        value = number(value)
        return NOTHING if value is None else show(value, *args, **options)

    return safe


@_or_nothing
def quality(value: float, metric: str, digits: int = 1) -> str:
    """Format a metric's value: "88.7 %" for a fraction, "2.314" for a loss."""
    return f"{100 * value:.{digits}f} %" if is_share(metric) else fixed(value)


def fixed(value: float) -> str:
    """Format a loss: three decimals, two from 10, none from 1,000."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def significant(value: float, digits: int = 2) -> str:
    """Format with two significant digits, integers from 100 in full: 0.031, 1.4, 41, 1,234."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    places = max(0, digits - 1 - math.floor(math.log10(abs(round(value, places)) or abs(value))))
    return f"{value:,.{places}f}"


@_or_nothing
def percent(share: float) -> str:
    """Format a fraction: "1.4 %", "41 %", "104 %", "0.031 %"."""
    return f"{significant(100 * share, 3 if 0.99 <= share < 1 else 2)} %"  # 99.7 % isn't 100 %


@_or_nothing
def times(ratio: float) -> str:
    """Format a factor: "1.7x"."""
    return f"{significant(ratio)}x"


@_or_nothing
def count(value: float) -> str:
    """Format an integer: "1,843,200"."""
    return f"{value:,.0f}"


@_or_nothing
def short_count(value: float) -> str:
    """Format a count for an axis or a narrow table: "1.3 k", "27 k", "1.8 M", "124 M"."""
    return _scaled(value, ("", " k", " M", " B", " T"))


@_or_nothing
def human_bytes(value: float) -> str:
    """Format bytes in decimal units (1 MB = 10^6 bytes), as file managers and the Hub do: "7.4 MB", "538 MB"."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while round(abs(value)) >= 1000 and power < len(units) - 1:  # rounded: 999.7 kB is 1.0 MB, not 1,000 kB
        value, power = value / 1000, power + 1
    digits = 1 if power and abs(value) < 9.95 else 0
    return f"{value:.{digits}f}{units[power]}"


@_or_nothing
def seconds(value: float) -> str:
    """Format a duration: "0.84 s", "12.3 s", "2 min 05 s", "1 h 03 min"."""
    if value < 59.95:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes:02d} min"


@_or_nothing
def milliseconds(value: float) -> str:
    """Format a latency: "1.31 ms", "84 ms"."""
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


@_or_nothing
def rate(value: float, unit: str = "") -> str:
    """Format a throughput: "812", "1,931", "8.4"."""
    return f"{value:.1f}{unit}" if value < 10 else f"{value:,.0f}{unit}"


@_or_nothing
def learning_rate(value: float) -> str:
    """Format a learning rate: "5e-5", "3e-3", "0.1"."""
    if value == 0 or value >= 0.1:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def signed(value: float, digits: int = 1) -> str:
    """Format with a sign, except where it rounds to zero: "-0.4", "+0.3", "0.0"."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def listed(parts: list[str]) -> str:
    """Join parts: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def article(following: str) -> str:
    """Return "a" or "an" for a number: an 8.1 MB, an 11 MB, a 110 MB checkpoint."""
    integer = following.replace(",", "").split(".")[0].split(" ")[0]
    return "an" if integer.startswith("8") or integer in ("11", "18") else "a"
