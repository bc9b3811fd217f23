"""What a comparison says, read safely: fields may be absent, null or not finite (a diverged arm has a NaN loss).

Every renderer asks here, so that "is there a full arm to compare with" has one answer.
"""

from __future__ import annotations

import math
import re
from typing import Any

from peft_recipes.arms.methods import METHODS as TABLE

Comparison = dict[str, Any]
NOT_PEFT = ("full", "head")
OWN_SPLITS = ("train", "validation", "test")  # any other split is an extra set, such as `clean`
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def number(value: Any) -> float | None:
    """`value` as a finite number, or None: for null, NaN, infinities, and what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def plain(text: Any) -> str:
    """Text from outside without control characters (they move a terminal's cursor) or marks that turn its direction."""
    return _CONTROLS.sub("", str(text).replace("\r\n", "\n"))


def telling_line(text: Any, limit: int = 160) -> str:
    """The line of an error that says something, cut at `limit` characters: the first, the last one of a traceback."""
    lines = [line.strip() for line in plain(text or "").splitlines() if line.strip()]
    if not lines:
        return ""
    return shorten(lines[-1] if lines[0].startswith("Traceback") else lines[0], limit)


def shorten(text: str, limit: int) -> str:
    """`text` on one line in at most `limit` characters; "..." where it was cut."""
    line = " ".join(plain(text).split())
    return line if len(line) <= limit else line[: limit - 3].rstrip() + "..."


def arms(comparison: Comparison) -> dict[str, dict]:
    """The arms in the recipe's order."""
    return {name: arm for name, arm in (comparison.get("arms") or {}).items() if isinstance(arm, dict)}


def metric(comparison: Comparison) -> str:
    """The name of the comparison's metric."""
    return comparison.get("metric") or "loss"


def is_peft(name: str, arm: dict) -> bool:
    """Whether the arm is an adapter (not full fine-tuning, not the head alone)."""
    return (arm.get("method") or name).lower() not in NOT_PEFT


def is_full(name: str, arm: dict) -> bool:
    """Whether the arm trains every parameter."""
    return (arm.get("method") or name).lower() == "full"


def mean(arm: dict | None) -> float | None:
    """The arm's mean of the comparison's metric on the test split, over its seeds."""
    return number(((arm or {}).get("metric") or {}).get("mean"))


def spread(arm: dict | None) -> float | None:
    """Standard deviation of the metric over the arm's seeds; None for one seed."""
    return number(((arm or {}).get("metric") or {}).get("sd"))


def seeds_done(arm: dict | None) -> int:
    """How many of the arm's seeds gave a value."""
    values = ((arm or {}).get("metric") or {}).get("values") or []
    return sum(number(value) is not None for value in values)


def measured(comparison: Comparison) -> dict[str, dict]:
    """The arms that have a value of the metric."""
    return {name: arm for name, arm in arms(comparison).items() if mean(arm) is not None}


def split_value(holder: dict | None, split: str, metric: str) -> float | None:
    """One metric of one split, of an arm or of the base."""
    return number((((holder or {}).get("metrics") or {}).get(split) or {}).get(metric))


def base_value(comparison: Comparison, split: str = "test") -> float | None:
    """The untuned base's value of the comparison's metric."""
    return split_value(comparison.get("base"), split, metric(comparison))


def extra_splits(comparison: Comparison) -> list[str]:
    """Evaluation sets beside train, validation and test, such as `clean`, on which the base or an arm was measured."""
    found: dict[str, None] = {}
    for holder in [comparison.get("base") or {}, *arms(comparison).values()]:
        found.update(dict.fromkeys(split for split in holder.get("metrics") or {} if split not in OWN_SPLITS))
    name = metric(comparison)
    holders = [comparison.get("base"), *arms(comparison).values()]
    return [split for split in found if any(split_value(holder, split, name) is not None for holder in holders)]


def difference(comparison: Comparison, name: str) -> dict | None:
    """The arm's difference, where it has a result and the estimate and interval are finite; else None."""
    found = (comparison.get("differences") or {}).get(name)
    if not found or number(found.get("estimate")) is None or mean(arms(comparison).get(name)) is None:
        return None
    interval = found.get("ci95") or []
    return found if len(interval) == 2 and all(number(bound) is not None for bound in interval) else None


def reference(comparison: Comparison, name: str | None = None) -> str | None:
    """The arm that `name` is held against: its difference's `against`, else the full arm; None where there is none."""
    against = (difference(comparison, name) or {}).get("against") if name else None
    if against in arms(comparison):
        return against
    return next((other for other, arm in arms(comparison).items() if is_full(other, arm)), None)


def ratio(arm: dict | None, other: dict | None, field: str) -> float | None:
    """arm's field divided by the other's, where both are known and the divisor is positive."""
    top, bottom = number((arm or {}).get(field)), number((other or {}).get(field))
    return top / bottom if top is not None and bottom and bottom > 0 else None


def parameter_share(arm: dict) -> float | None:
    """Trained parameters as a part of the base's (with its task head)."""
    trained, total = number(arm.get("trainable_parameters")), number(arm.get("total_parameters"))
    return trained / total if trained is not None and total and total > 0 else None


def gain(comparison: Comparison, name: str, split: str = "test") -> float | None:
    """How much better than the base the arm is on `split`, in the metric's unit; positive is better for a loss too."""
    before = base_value(comparison, split)
    arm = arms(comparison)[name]
    after = mean(arm) if split == "test" else split_value(arm, split, metric(comparison))
    if before is None or after is None:
        return None
    return after - before if comparison.get("higher_is_better", True) else before - after


def rank_groups(comparison: Comparison) -> list[list[str]]:
    """Measured arms that differ in rank only (same method, same targets), by rank; groups of two ranks or more."""
    groups: dict[tuple, dict[int, str]] = {}
    for name, arm in measured(comparison).items():
        if arm.get("rank") and is_peft(name, arm):
            key = (
                arm.get("method"),
                display_method(name, arm),
                tuple(sorted(map(str, arm.get("target_modules") or []))),
            )
            groups.setdefault(key, {}).setdefault(arm["rank"], name)
    return [[group[rank] for rank in sorted(group)] for group in groups.values() if len(group) > 1]


METHODS = {
    "LORA": "LoRA", "DORA": "DoRA", "RSLORA": "rsLoRA", "ADALORA": "AdaLoRA", "RANDLORA": "RandLoRA", "PISSA": "PiSSA",
    "QLORA": "QLoRA", "VERA": "VeRA", "IA3": "IA3", "LOHA": "LoHa", "LOKR": "LoKr", "LN_TUNING": "LayerNorm tuning",
    "PREFIX_TUNING": "Prefix tuning", "PROMPT_TUNING": "Prompt tuning", "P_TUNING": "P-tuning",
    "FOURIERFT": "FourierFT",
    "FULL": "Full fine-tuning", "HEAD": "Head only", "BITFIT": "BitFit",
}  # fmt: skip


def display_method(name: str, arm: dict) -> str:
    """The method as its paper writes it. A variant that peft files under LORA (DoRA) is told by the arm's name."""
    method = str(arm.get("method") or name).upper()
    if name in TABLE and _files_under(TABLE[name].config, method):
        return TABLE[name].title
    variant = re.split(r"[-_ ]", name, maxsplit=1)[0].upper()
    if method == "LORA" and variant in METHODS and variant.endswith(("LORA", "DORA", "PISSA")):
        method = variant
    return METHODS.get(method, plain(arm.get("method") or name))


def _files_under(config: str, method: str) -> bool:
    """Whether PEFT's name of a method ("LN_TUNING") is that of a configuration's class ("LNTuningConfig")."""
    plain_name = config.removesuffix("Config").upper()
    return plain_name == method.replace("_", "") or (config, method) == ("PromptEncoderConfig", "P_TUNING")


def label(comparison: Comparison, name: str) -> str:
    """How an arm is called in sentences and tables: "LoRA r=16"; with its name where that says more."""
    arm = arms(comparison).get(name) or {}
    method, rank = display_method(name, arm), arm.get("rank")
    called = f"{method} r={rank}" if rank and is_peft(name, arm) else method
    if name in TABLE and TABLE[name].title == method:
        return called
    known = {
        method.lower(),
        (arm.get("method") or name).lower(),
        f"{method.lower()}-r{rank}",
        f"{method.lower()}-{rank}",
    }
    return called if name.lower() in known else f"{called} ({plain(name)})"


def stand_ins(comparison: Comparison) -> dict[str, str]:
    """What of a comparison is an embedded stand-in: "model" or "data" -> its name; empty where it is the real thing."""
    if not comparison.get("embedded"):
        return {}
    found = {"model": plain(comparison.get("model", "?")), "data": plain(comparison.get("dataset", "?"))}
    return {what: name for what, name in found.items() if name.startswith("embedded:")} or found
