"""Numbers as people read them. One place, so that the table, the sentence and the plots never disagree."""

from __future__ import annotations

import math
from typing import Any

from peft_recipes.reporting.facts import number

NOTHING = "-"
_SHARES = ("accuracy", "f1", "precision", "recall", "exact_match")
_METRICS = {"macro_f1": "macro F1", "f1": "F1", "token_accuracy": "token accuracy", "exact_match": "exact match"}


def is_share(metric: str) -> bool:
    """Whether the metric is a fraction that is shown in percent, and its differences in points."""
    return any(part in metric for part in _SHARES)


def metric_title(metric: str) -> str:
    """The metric's name in running text: "accuracy", "macro F1"."""
    return _METRICS.get(metric, metric.replace("_", " "))


def quality(value: Any, metric: str, digits: int = 1) -> str:
    """A metric's value: "88.7 %" for a fraction, "2.314" for a loss."""
    value = number(value)
    if value is None:
        return NOTHING
    return f"{100 * value:.{digits}f} %" if is_share(metric) else fixed(value)


def fixed(value: float) -> str:
    """A loss: three decimals, two from 10, fewer above 1,000."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def significant(value: float, digits: int = 2) -> str:
    """Two significant digits without an exponent; whole numbers from 100 with all theirs: 0.031, 1.4, 41, 1,234."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    places = max(0, digits - 1 - math.floor(math.log10(abs(round(value, places)) or abs(value))))
    return f"{value:,.{places}f}"


def percent(share: Any) -> str:
    """A part of a whole: "1.4 %", "41 %", "104 %", "0.031 %"."""
    share = number(share)
    if share is None:
        return NOTHING
    return f"{significant(100 * share, 3 if 0.99 <= share < 1 else 2)} %"  # 99.7 % is not all


def times(ratio: Any) -> str:
    """A factor: "1.7x"."""
    ratio = number(ratio)
    return NOTHING if ratio is None else f"{significant(ratio)}x"


def count(value: Any) -> str:
    """A whole number with separators: "1,843,200"."""
    value = number(value)
    return NOTHING if value is None else f"{value:,.0f}"


def short_count(value: Any) -> str:
    """A count for an axis or a narrow table: "1.3 k", "27 k", "1.8 M", "124 M"."""
    value = number(value)
    if value is None:
        return NOTHING
    return _scaled(value, 1000, ("", " k", " M", " B", " T"))


def human_bytes(value: Any) -> str:
    """Bytes in decimal units (1 MB = 10^6), as file managers and the Hub show them: "7.4 MB", "538 MB"."""
    value = number(value)
    return NOTHING if value is None else _scaled(value, 1000, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    if round(abs(value)) >= step and power < len(units) - 1:  # 999.7 kB is 1.0 MB, not 1,000 kB
        value, power = value / step, power + 1
    digits = 1 if power and abs(value) < 9.95 else 0
    return f"{value:.{digits}f}{units[power]}"


def seconds(value: Any) -> str:
    """A duration: "0.84 s", "12.3 s", "2 min 05 s", "1 h 03 min"."""
    value = number(value)
    if value is None:
        return NOTHING
    if value < 59.95:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes:02d} min"


def milliseconds(value: Any) -> str:
    """A latency: "1.31 ms", "84 ms"."""
    value = number(value)
    if value is None:
        return NOTHING
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def rate(value: Any, unit: str = "") -> str:
    """A throughput: "812", "1,931", "8.4"."""
    value = number(value)
    if value is None:
        return NOTHING
    return f"{value:.1f}{unit}" if value < 10 else f"{value:,.0f}{unit}"


def learning_rate(value: Any) -> str:
    """A learning rate as people write it: "5e-5", "3e-3", "0.1"."""
    value = number(value)
    if value is None:
        return NOTHING
    if value == 0 or value >= 0.1:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, and without one when it rounds to zero: "-0.4", "+0.3", "0.0"."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def listed(parts: list[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def article(following: str) -> str:
    """ "a" or "an" before a number: an 8.1 MB, an 11 MB, a 110 MB checkpoint."""
    whole = following.replace(",", "").split(".")[0].split(" ")[0]
    return "an" if whole.startswith("8") or whole in ("11", "18") else "a"
