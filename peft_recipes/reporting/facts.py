"""Safe access to a comparison: fields may be missing, null or not finite (a diverged arm has a NaN loss).

All renderers read through these functions, so that they agree, for example on which arm is the reference.
"""

from __future__ import annotations

import math
import re
from typing import Any

from peft_recipes.arms.methods import METHODS
from peft_recipes.recipe.metrics import METRICS

Comparison = dict[str, Any]
STANDARD_SPLITS = ("train", "validation", "test")  # any other split is an extra one, such as `clean`
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def number(value: Any) -> float | None:
    """Return `value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def plain(text: Any) -> str:
    """Remove control characters (they move a terminal's cursor) and text direction marks from untrusted text."""
    return _CONTROLS.sub("", str(text).replace("\r\n", "\n"))


def error_line(text: Any, limit: int = 160) -> str:
    """Return the most useful line of an error, at most `limit` characters: the first, or the last of a traceback."""
    lines = [line.strip() for line in plain(text or "").splitlines() if line.strip()]
    if not lines:
        return ""
    return shorten(lines[-1] if lines[0].startswith("Traceback") else lines[0], limit)


def shorten(text: str, limit: int) -> str:
    """Return `text` on one line, cut with "..." to at most `limit` characters."""
    line = " ".join(plain(text).split())
    return line if len(line) <= limit else line[: limit - 3].rstrip() + "..."


def arms(comparison: Comparison) -> dict[str, dict]:
    """Return the arms in the recipe's order."""
    return {name: arm for name, arm in (comparison.get("arms") or {}).items() if isinstance(arm, dict)}


def metric(comparison: Comparison) -> str:
    """Return the name of the comparison's metric."""
    return comparison.get("metric") or "loss"


def selection_metric(comparison: Comparison) -> str:
    """Return the metric that is followed on the validation split: the loss where the comparison's is of answers."""
    return comparison.get("selection_metric") or metric(comparison)


def is_peft(name: str, arm: dict) -> bool:
    """Return whether the arm is an adapter (not full fine-tuning, not the head alone)."""
    return (arm.get("method") or name).lower() not in ("full", "head")


def is_full(name: str, arm: dict) -> bool:
    """Return whether the arm is full fine-tuning."""
    return (arm.get("method") or name).lower() == "full"


def mean(arm: dict | None) -> float | None:
    """Return the mean of the comparison's metric on the test split over the arm's seeds."""
    return number(((arm or {}).get("metric") or {}).get("mean"))


def spread(arm: dict | None) -> float | None:
    """Return the standard deviation of the metric over the arm's seeds; None for one seed."""
    return number(((arm or {}).get("metric") or {}).get("sd"))


def given_up(arm: dict[str, Any]) -> bool:
    """Whether an arm was stopped or dropped before all its seeds were trained."""
    return any(one.get("state") in ("stopped", "dropped") for one in arm.get("unfinished") or [])


def seeds_done(arm: dict | None) -> int:
    """Return how many of the arm's seeds have a value."""
    values = ((arm or {}).get("metric") or {}).get("values") or []
    return sum(number(value) is not None for value in values)


def measured(comparison: Comparison) -> dict[str, dict]:
    """Return the arms that have a value of the metric."""
    return {name: arm for name, arm in arms(comparison).items() if mean(arm) is not None}


def split_value(holder: dict | None, split: str, metric: str) -> float | None:
    """Return a metric of a split, of an arm or of the base."""
    return number((((holder or {}).get("metrics") or {}).get(split) or {}).get(metric))


def split_metric(comparison: Comparison, split: str) -> str:
    """Return the metric of a split: a benchmark's own, or the comparison's."""
    return _change(comparison, split).get("metric") or metric(comparison)


def shown_as(comparison: Comparison, split: str) -> str:
    """Return the metric by which a split's values are formatted: of lm_eval's many metrics a share or a number."""
    name, share = split_metric(comparison, split), _change(comparison, split).get("share")
    return name if name in METRICS or share is None else "accuracy" if share else "loss"


def _change(comparison: Comparison, split: str) -> dict[str, Any]:
    return (comparison.get("forgetting") or {}).get(split) or {}


def base_value(comparison: Comparison, split: str = "test") -> float | None:
    """Return the untuned base's value of a split's metric."""
    return split_value(comparison.get("base"), split, split_metric(comparison, split))


def extra_splits(comparison: Comparison) -> list[str]:
    """Return further evaluation splits, such as `clean`, and benchmarks, where the base or an arm has a value."""
    splits: dict[str, bool] = {}
    for holder in [comparison.get("base") or {}, *arms(comparison).values()]:
        for split in holder.get("metrics") or {}:
            has_value = split_value(holder, split, split_metric(comparison, split)) is not None
            splits[split] = splits.get(split) or (has_value and split not in STANDARD_SPLITS)
    return [split for split, is_extra in splits.items() if is_extra]


def difference(comparison: Comparison, name: str) -> dict | None:
    """Return the arm's difference if the arm has a result and estimate and interval are finite, else None."""
    entry = (comparison.get("differences") or {}).get(name)
    if not entry or number(entry.get("estimate")) is None or mean(arms(comparison).get(name)) is None:
        return None
    interval = entry.get("ci95") or []
    return entry if len(interval) == 2 and all(number(bound) is not None for bound in interval) else None


def decided_after(comparison: Comparison, name: str) -> int | None:
    """Return how many seeds decided on an arm; None if seeds were not added until it was, or it is open."""
    decided = (comparison.get("design") or {}).get("decided") or {}
    return (decided.get(name) or {}).get("seeds")


def reference(comparison: Comparison, name: str | None = None) -> str | None:
    """Return the arm that `name` is compared with: its difference's `against`, else the full arm, else None."""
    against = (difference(comparison, name) or {}).get("against") if name else None
    if against in arms(comparison):
        return against
    return next((other for other, arm in arms(comparison).items() if is_full(other, arm)), None)


MEMORY_FIELDS = ("peak_memory_bytes",)
TIME_FIELDS = (
    "training_seconds", "warmup_seconds", "total_seconds", "tokens_per_second", "examples_per_second", "latency_ms",
    "generation_tokens_per_second",
)  # fmt: skip


def ratio(arm: dict | None, other: dict | None, field: str) -> float | None:
    """Return the arm's field divided by the other's if both are known, comparable, and the divisor is positive."""
    if not (comparable(arm, field) and comparable(other, field)):
        return None
    top, bottom = number((arm or {}).get(field)), number((other or {}).get(field))
    return top / bottom if top is not None and bottom and bottom > 0 else None


def comparable(arm: dict | None, field: str) -> bool:
    """Return whether an arm's figure may be divided by another arm's: times and memory need the same conditions."""
    timing = (arm or {}).get("timing") or {}
    if field in TIME_FIELDS:
        return timing.get("comparable", True)
    own = timing.get("same_environment", True) and timing.get("memory", True)
    return own if field in MEMORY_FIELDS else True


def was_busy(comparison: Comparison) -> bool:
    """Return whether the machine did something else while an arm was timed."""
    timings = [arm.get("timing") or {} for arm in measured(comparison).values()]
    return any(one.get("same_environment", True) and not one.get("comparable", True) for one in timings)


def comparable_figures(comparison: Comparison, field: str) -> tuple[dict[str, float], str]:
    """Return a figure of each measured arm that may share an axis with the others', and a caption on those left out.

    An arm that can't be compared with the reference is left out; all are, where the reference itself can't.
    """
    found = {name: number(arm.get(field)) for name, arm in measured(comparison).items()}
    found = {name: value for name, value in found.items() if value is not None and value > 0}
    against = arms(comparison).get(reference(comparison) or "")
    kept = {name: value for name, value in found.items() if comparable(arms(comparison)[name], field)}
    kept = kept if comparable(against, field) else {}
    left_out = ", ".join(f"'{name}'" for name in found if name not in kept)
    return kept, f" Left out, since measured under other conditions: {left_out}." if left_out else ""


def not_comparable(comparison: Comparison, name: str) -> str:
    """Return why an arm's times, or times and memory, have no ratio to its reference's; empty if they have."""
    pair = [arms(comparison).get(each or "") or {} for each in (name, reference(comparison, name))]
    reasons = (plain((arm.get("timing") or {}).get("why") or "") for arm in pair)
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def parameter_share(arm: dict) -> float | None:
    """Return trained parameters as a share of the base's parameters (with its task head)."""
    trained, total = number(arm.get("trainable_parameters")), number(arm.get("total_parameters"))
    return trained / total if trained is not None and total and total > 0 else None


def gain(comparison: Comparison, name: str, split: str = "test") -> float | None:
    """Return how much better than the base the arm is on `split`; positive is better, also for a loss."""
    before = base_value(comparison, split)
    arm = arms(comparison)[name]
    after = mean(arm) if split == "test" else split_value(arm, split, split_metric(comparison, split))
    if before is None or after is None:
        return None
    higher = _change(comparison, split).get("higher_is_better", comparison.get("higher_is_better", True))
    return after - before if higher else before - after


def rank_groups(comparison: Comparison) -> list[list[str]]:
    """Group measured arms that differ only in rank, by rank; groups of two or more.

    An older comparison.json has no groups: there, arms of one method and the same targets.
    """
    if (stored := comparison.get("rank_groups")) is not None:
        known = measured(comparison)
        finished = ([name for name in group if name in known] for group in stored)
        return [group for group in finished if len(group) > 1]
    groups: dict[tuple, dict[int, str]] = {}
    for name, arm in measured(comparison).items():
        if arm.get("rank") and is_peft(name, arm):
            targets = tuple(sorted(map(str, arm.get("target_modules") or [])))
            key = (arm.get("method"), display_method(name, arm), targets)
            groups.setdefault(key, {}).setdefault(arm["rank"], name)
    return [[group[rank] for rank in sorted(group)] for group in groups.values() if len(group) > 1]


def _peft_name(config: str) -> str:
    """Return PEFT's name of a method, without underscores, from its configuration class: LNTuningConfig -> LNTUNING."""
    return "PTUNING" if config == "PromptEncoderConfig" else config.removesuffix("Config").upper()


_TITLES = {_peft_name(method.config): method.title for method in reversed(METHODS.values())}  # of several the first
_TITLES |= {"FULL": "Full fine-tuning", "HEAD": "Head only"}


def display_method(name: str, arm: dict) -> str:
    """Return the title of the arm's method. Variants that PEFT files under LORA (DoRA) are known by the arm's name."""
    method = str(arm.get("method") or name)
    key = method.upper().replace("_", "")
    for variant in (name, re.split(r"[-_ ]", name, maxsplit=1)[0].lower()):
        if variant in METHODS and _peft_name(METHODS[variant].config) == key:
            return METHODS[variant].title
    return _TITLES.get(key, plain(method))


def label(comparison: Comparison, name: str) -> str:
    """Return an arm's name for sentences and tables: "LoRA r=16", or "LoRA r=8 (lora-conv)" if its name adds to it."""
    arm = arms(comparison).get(name) or {}
    title, rank = display_method(name, arm), arm.get("rank")
    text = f"{title} r={rank}" if rank and is_peft(name, arm) else title
    method = title.lower()
    redundant = {method, (arm.get("method") or name).lower(), f"{method}-r{rank}", f"{method}-{rank}"}
    if name.lower() in redundant or (name in METHODS and METHODS[name].title == title):
        return text
    return f"{text} ({plain(name)})"


def stand_ins(comparison: Comparison) -> dict[str, str]:
    """Return the embedded stand-ins of a comparison by what they replace, "model" or "data"."""
    if not comparison.get("embedded"):
        return {}
    names = {"model": plain(comparison.get("model", "?")), "data": plain(comparison.get("dataset", "?"))}
    return {part: name for part, name in names.items() if name.startswith("embedded:")} or names
