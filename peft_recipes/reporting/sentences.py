"""Sentences of a report: verdict, caveats, forgetting, latency.

What the numbers mean: docs/concepts/measurements.md; how the verdict is decided: docs/concepts/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.reporting import answer_figures, facts, provisional
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison

VERDICTS = ("equivalent", "better", "worse", "not shown")
FULL_NAME = "full fine-tuning"


@dataclass(frozen=True)
class Difference:
    """An arm's difference from its reference as text, in points, percent of a loss or the metric's unit."""

    estimate: str
    low: str
    high: str
    margin: str
    unit: str
    verdict: str

    @property
    def interval(self) -> str:
        """The interval: "-1.1 to +0.3"."""
        return f"{self.low} to {self.high}"

    def __str__(self) -> str:
        return f"{self.estimate}{self.unit}, 95 % interval {self.interval}{self.unit if self.unit == ' %' else ''}"


def describe_difference(comparison: Comparison, name: str) -> Difference | None:
    """Return the arm's difference as text, with enough digits that the rounded interval agrees with the verdict."""
    entry = facts.difference(comparison, name)
    if entry is None:
        return None
    scale, unit = difference_scale(comparison, name)
    low, high = (bound * scale for bound in entry["ci95"])
    margin = abs((facts.number(entry.get("margin")) or facts.number(comparison.get("margin")) or 0) * scale)
    digits = _digits(low, high, margin, start=1 if unit else 3)
    return Difference(
        estimate=fmt.signed(entry["estimate"] * scale, digits),
        low=fmt.signed(low, digits),
        high=fmt.signed(high, digits),
        margin=_margin(margin, unit),
        unit=unit,
        verdict=entry.get("verdict") if entry.get("verdict") in VERDICTS else "not shown",
    )


def difference_scale(comparison: Comparison, name: str) -> tuple[float, str]:
    """Return factor and unit of a difference: points of a fraction, or percent of the reference's loss."""
    if fmt.is_share(facts.metric(comparison)):
        return 100.0, " points"
    against = facts.mean(facts.arms(comparison).get(facts.reference(comparison, name) or ""))
    return (100.0 / against, " %") if against and against > 0 else (1.0, "")


def _digits(low: float, high: float, margin: float, start: int) -> int:
    """Return enough digits that rounding moves no bound across zero or the margin."""

    def side(bound: float) -> tuple[int, bool]:
        return (bound > 0) - (bound < 0), abs(bound) <= margin + 1e-12

    for digits in range(start, start + 3):
        if all(side(round(bound, digits)) == side(bound) for bound in (low, high)):
            return digits
    return start


def _margin(margin: float, unit: str) -> str:
    text = f"{round(margin, 3):g}"
    return f"{text} point" if unit == " points" and text == "1" else f"{text}{unit}"


def headline_arm(comparison: Comparison) -> str | None:
    """Return the arm the report leads with: `lora`, else the first PEFT arm, else the first arm but full.

    One that was stopped or dropped only where all adapters were.
    """
    arms = facts.arms(comparison)
    adapters = [name for name, arm in arms.items() if facts.is_peft(name, arm)]
    adapters = [name for name in adapters if not facts.given_up(arms[name])] or adapters
    others = [name for name, arm in arms.items() if not facts.is_full(name, arm)]
    return next((name for name in adapters if name == "lora"), next(iter(adapters + others + list(arms)), None))


def verdict_sentence(comparison: Comparison, arm: str) -> str:
    """Return the arm's quality and cost compared with full fine-tuning, with caveats, as plain text.

    Raises KeyError for an arm that is not in the comparison.
    """
    return " ".join([verdict_headline(comparison, arm), *caveats(comparison, arm)])


def verdict_headline(comparison: Comparison, name: str) -> str:
    """Return the verdict sentence without caveats."""
    arm = facts.arms(comparison)[name]
    if facts.mean(arm) is None:
        return f"{_subject(comparison, name)} has no result{_yet(arm)}: {no_figures(comparison, arm)}."
    return provisional.so_far(comparison, name) + _headline(comparison, name)


def _headline(comparison: Comparison, name: str) -> str:
    """Return the verdict sentence of an arm with a result."""
    against = facts.reference(comparison, name)
    if name == against or against is None:
        missing = "" if against else "; there is no full fine-tune to compare it with"
        return f"{_reached(comparison, name)}{missing}."
    full = facts.arms(comparison)[against]
    if facts.mean(full) is None:
        missing = f"{_other(comparison, against)} has no result{_yet(full)} to compare it with"
        return f"{_reached(comparison, name)}; {missing} ({no_figures(comparison, full)})."
    difference = describe_difference(comparison, name)
    if difference is None:
        kept = _kept(comparison, name, against, f"{_other(comparison, against)}'s")
        missing = "there is no interval yet" if provisional.entry(comparison) else "no interval was computed"
        return f"{_subject(comparison, name)} {kept} ({missing}){_costs(comparison, name, against)}."
    return _compared(comparison, name, against, difference)


def _yet(arm: dict) -> str:
    return " yet" if arm.get("status") == "pending" else ""


def _compared(comparison: Comparison, name: str, against: str, difference: Difference) -> str:
    subject, other, costs = _subject(comparison, name), _other(comparison, against), _costs(comparison, name, against)
    seeds = facts.decided_after(comparison, name)
    decided = f", decided after {seeds} seeds" if seeds else ""
    if difference.verdict == "equivalent":
        kept = _kept(comparison, name, against, f"{other}'s")
        return f"{subject} {kept} (difference {difference}: equivalent within {difference.margin}{decided}){costs}."
    kept = _kept(comparison, name, against, "full's" if other == FULL_NAME else f"{against}'s")
    if difference.verdict == "not shown":
        return (
            f"Whether {_other(comparison, name)} matches {other} is not shown: it {kept} (difference {difference}, "
            f"which neither excludes zero nor stays within {difference.margin}){costs}."
        )
    return f"{subject} is {difference.verdict} than {other}: it {kept} (difference {difference}{decided}){costs}."


def _kept(comparison: Comparison, name: str, against: str, owner: str) -> str:
    """Return "keeps 99.1 % of full fine-tuning's accuracy", or both losses. `owner`: "full's", "full fine-tuning's"."""
    metric, arms = facts.metric(comparison), facts.arms(comparison)
    mine, theirs = facts.mean(arms[name]), facts.mean(arms[against])
    if metric == PREFERENCE and facts.is_full(against, arms[against]):
        return f"wins {fmt.quality(mine, metric)} of the comparisons with {owner} answers, where a tie is half a win"
    if fmt.is_share(metric) and theirs and theirs > 0:
        verb = "keeps" if mine <= theirs else "reaches"
        return f"{verb} {100 * mine / theirs:.1f} % of {owner} {fmt.metric_title(metric)}"
    return f"reaches {_a_metric(metric)} of {fmt.quality(mine, metric)} against {owner} {fmt.quality(theirs, metric)}"


def _reached(comparison: Comparison, name: str) -> str:
    """Return an arm's quality and costs as absolute figures, for an arm without a reference."""
    arm, metric = facts.arms(comparison)[name], facts.metric(comparison)
    value = fmt.quality(facts.mean(arm), metric)
    reached = f"{value} {fmt.metric_title(metric)}" if fmt.is_share(metric) else f"{_a_metric(metric)} of {value}"
    parts = []
    if (share := facts.parameter_share(arm)) is not None:
        parts.append("all parameters trained" if share >= 0.9999 else f"{fmt.percent(share)} of the parameters trained")
    if facts.number(arm.get("peak_memory_bytes")) and (arm.get("timing") or {}).get("memory", True):
        parts.append(f"{fmt.human_bytes(arm['peak_memory_bytes'])} of memory at its peak")
    if facts.number(arm.get("training_seconds")) is not None:
        parts.append(f"{fmt.seconds(arm['training_seconds'])} of training")
    if facts.number(arm.get("checkpoint_bytes")):
        size = fmt.human_bytes(arm["checkpoint_bytes"])
        parts.append(f"{fmt.article(size)} {size} checkpoint")
    return f"{_subject(comparison, name)} reaches {reached}" + (f", with {fmt.listed(parts)}" if parts else "")


def _costs(comparison: Comparison, name: str, against: str) -> str:
    """Return ", with 1.4 % of the parameters, 41 % of the memory and a 7.4 MB checkpoint instead of 538 MB"."""
    arm, other = facts.arms(comparison)[name], facts.arms(comparison)[against]
    parts = []
    if (share := facts.ratio(arm, other, "trainable_parameters")) is not None:
        parts.append(f"{fmt.percent(share)} of the parameters")
    if (share := facts.ratio(arm, other, "peak_memory_bytes")) is not None:
        parts.append(f"{fmt.percent(share)} of the memory")
    if (speed := facts.ratio(other, arm, "training_seconds")) is not None:
        parts.append(f"{fmt.times(speed)} the speed")
    if facts.ratio(arm, other, "checkpoint_bytes") is not None:
        size = fmt.human_bytes(arm["checkpoint_bytes"])
        parts.append(f"{fmt.article(size)} {size} checkpoint instead of {fmt.human_bytes(other['checkpoint_bytes'])}")
    return f", with {fmt.listed(parts)}" if parts else ""


def caveats(comparison: Comparison, name: str) -> list[str]:
    """Return what limits the verdict: a loss alone, one seed, failed seeds, stand-ins."""
    arm, difference = facts.arms(comparison)[name], facts.difference(comparison, name)
    done = facts.seeds_done(arm)
    alone = answer_figures.loss_alone(comparison) if facts.mean(arm) is not None else ""
    lines = [alone] if alone else []
    seeds = facts.number((difference or {}).get("seeds")) or done
    if facts.mean(arm) is not None and seeds == 1:
        covered = "the interval covers the test examples only, not the variation between seeds"
        lines.append(f"One seed: {covered}." if difference else "One seed: the variation between seeds is not known.")
    failed = len(arm.get("failures") or [])
    if failed and done:
        verb = "is" if failed == 1 else "are"
        lines.append(f"{failed} of {failed + done} seeds failed and {verb} not in the figures.")
    if names := dict.fromkeys(str(one.get("check")) for one in arm.get("failed_checks") or []):
        lines.append(f"A check failed after training: {', '.join(map(facts.plain, names))}.")
    if facts.mean(arm) is not None and (why := facts.not_comparable(comparison, name)):
        lines.append(f"{_uncompared(comparison, name)} not compared: {why}.")
    if done and (others := arm.get("unfinished")):
        states = fmt.listed(list(dict.fromkeys(str(one.get("state")) for one in others)))
        states = f" ({states})" if not provisional.entry(comparison) else ""
        lines.append(f"{done} of {done + failed + len(others)} seeds finished{states}.")
    if comparison.get("embedded"):
        lines.append(stand_in(comparison))
    return lines


def _uncompared(comparison: Comparison, name: str) -> str:
    """Return "Times are", or "Time, memory and latency are" where the environments differ."""
    pair = [facts.arms(comparison).get(each or "") for each in (name, facts.reference(comparison, name))]
    memory = all(facts.comparable(arm, "peak_memory_bytes") for arm in pair)
    return "Times are" if memory else "Time, memory and latency are"


def stand_in(comparison: Comparison) -> str:
    """Return the sentence that names the embedded stand-ins."""
    stand_ins = facts.stand_ins(comparison)
    names = ", ".join(f"{part} {name}" for part, name in stand_ins.items())
    nouns = "embedded stand-ins" if len(stand_ins) > 1 else "an embedded stand-in"
    return f"Measured on {nouns} ({names}), not on the recipe's own {' and '.join(stand_ins)}."


def no_figures(comparison: Comparison, arm: dict) -> str:
    """Return why an arm has no figures: it is not finished, it failed, or its answers are judged at the end."""
    if provisional.is_unfinished(arm):
        return provisional.unfinished(comparison, arm)
    if provisional.entry(comparison) and arm.get("seeds") and facts.metric(comparison) == PREFERENCE:
        return "its answers are judged once all runs have ended"
    return failure(arm)


def failure(arm: dict) -> str:
    """Return why an arm has no figures: "out of memory", "failed: ValueError: ...", "no figures"."""
    reason = facts.error_line(arm.get("error")).rstrip(".")
    if not reason and arm.get("failures"):
        reason = facts.error_line(arm["failures"][0].get("error")).rstrip(".")
    if arm.get("status") == "out-of-memory":
        return f"out of memory: {reason}" if reason and "out of memory" not in reason.lower() else "out of memory"
    if arm.get("status") == "failed":
        return f"failed: {reason}" if reason else "failed"
    return reason or "no figures"


def forgetting(comparison: Comparison) -> list[str]:
    """Return a line for each extra evaluation split: the base's value before tuning and each arm's after."""
    lines = []
    for split in facts.extra_splits(comparison):
        metric, shown = facts.split_metric(comparison, split), facts.shown_as(comparison, split)
        before, after = facts.base_value(comparison, split), []
        for name, arm in facts.arms(comparison).items():
            value = facts.split_value(arm, split, metric)
            if value is not None:
                moved = ""
                if before is not None:
                    moved = f" ({change(value - before, shown)}{_forgetting_interval(comparison, split, name)})"
                after.append(f"{mentioned(comparison, name)} {fmt.quality(value, shown)}{moved}")
        if after:
            start = f"before tuning {fmt.quality(before, shown)}; after: " if before is not None else "after tuning: "
            lines.append(f"{facts.plain(split).capitalize()} {fmt.metric_title(metric)} {start}{', '.join(after)}.")
    return lines


def latency(comparison: Comparison) -> str:
    """Return one line with the latency of every arm, for narrow tables; empty if none was measured."""
    base, each = None, []
    for name, arm in facts.measured(comparison).items():
        figures = arm.get("latency_ms") or {}
        own, merged = facts.number(figures.get("adapter")), facts.number(figures.get("merged"))
        if not facts.is_peft(name, arm):
            own = facts.number(figures.get("base"))
        elif base is None:
            base = facts.number(figures.get("base"))
        if own is not None:
            suffix = f" (merged {fmt.milliseconds(merged)})" if merged is not None else ""
            each.append(f"{mentioned(comparison, name)} {fmt.milliseconds(own)}{suffix}")
    first = [f"the base {fmt.milliseconds(base)}"] if base is not None else []
    busy = ", measured on a busy machine" if facts.was_busy(comparison) else ""
    return f"Latency at batch 1{busy}: {', '.join(first + each)}." if each else ""


def _forgetting_interval(comparison: Comparison, split: str, name: str) -> str:
    """Return ", 95 % interval -1.6 to -0.3: forgot" for an arm's change on an extra split, if it has an interval."""
    entry = (((comparison.get("forgetting") or {}).get(split) or {}).get("arms") or {}).get(name)
    if not entry:
        return ""
    share = fmt.is_share(facts.shown_as(comparison, split))
    margin = facts.number(comparison["forgetting"][split].get("margin")) or 0
    return f", {interval_and_verdict(entry['ci95'], margin, share, entry['verdict'])}"


def interval_and_verdict(ci95: Sequence[float], margin: float, share: bool, verdict: str) -> str:
    """Return "95 % interval -1.6 to -0.3: forgot" for a change from the base, with digits that fit the verdict."""
    scale = 100 if share else 1
    low, high = (scale * bound for bound in ci95)
    digits = _digits(low, high, scale * margin, start=1 if share else 3)
    words = {"worse": "forgot", "better": "gained", "equivalent": "kept"}.get(verdict, "not shown")
    return f"95 % interval {fmt.signed(low, digits)} to {fmt.signed(high, digits)}: {words}"


def change(amount: float, metric: str) -> str:
    """Format a change of a metric: "-1.1 points", "+0.021"."""
    return f"{fmt.signed(100 * amount)} points" if fmt.is_share(metric) else fmt.signed(amount, 3)


def code_spans(text: str) -> list[tuple[bool, str]]:
    """Split `text` at its backticks, which mark commands in advice, into (is code, piece)."""
    return [(index % 2 == 1, piece) for index, piece in enumerate(text.split("`")) if piece]


def _a_metric(metric: str) -> str:
    title = fmt.metric_title(metric)
    return f"{'an' if title[0] in 'aeiou' or title == 'F1' else 'a'} {title}"


def _subject(comparison: Comparison, name: str) -> str:
    return _named(comparison, name, "Full fine-tuning", "Training the head alone")


def _other(comparison: Comparison, name: str) -> str:
    return _named(comparison, name, FULL_NAME, "training the head alone")


def reference_name(comparison: Comparison, name: str) -> str:
    """Return the name of an arm's reference inside a sentence."""
    against = facts.reference(comparison, name)
    return _other(comparison, against) if against else "the reference"


def mentioned(comparison: Comparison, name: str) -> str:
    return _named(comparison, name, FULL_NAME, "the head alone")


def _named(comparison: Comparison, name: str, full: str, head: str) -> str:
    label = facts.label(comparison, name)
    return {"Full fine-tuning": full, "Head only": head}.get(label, label)
