"""What to try next, drawn from a comparison's own evidence: every line cites the numbers it rests on.

A rule reads the comparison and gives lines, or none. Commands stand between backticks.
"""

from __future__ import annotations

import math

from peft_recipes.models.architecture_table import ARCHITECTURES
from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.commands import clean, compare_command, on_real_data, pair
from peft_recipes.reporting.curves import curve
from peft_recipes.reporting.facts import Comparison

MOST_LINES = 6
NEAR_LIMIT = 0.85  # of the machine's memory
USUAL_RATE_RATIO = 10  # an adapter's best learning rate over full's ("LoRA without regret", Thinking Machines, 2025)
MEMORY_FIELDS = ("memory_bytes", "device_memory_bytes", "total_memory_bytes")


def next_steps(comparison: Comparison) -> list[str]:
    """At most six lines of what to try next, the most urgent first; commands between backticks."""
    lines = [line for rule in RULES for line in rule(comparison)]
    return list(dict.fromkeys(lines))[:MOST_LINES]


def failed_arms(comparison: Comparison) -> list[str]:
    """Arms without a result: what stopped them, and the way on."""
    lines = []
    for name, arm in facts.arms(comparison).items():
        if facts.mean(arm) is not None:
            continue
        called = _called(comparison, name)
        again = f"then `{compare_command(comparison, name)}` runs only what is missing."
        if arm.get("status") == "out-of-memory":
            lines.append(
                f"{called} ran out of memory: halve `training.per_device_train_batch_size` and double "
                f"`training.gradient_accumulation_steps` (the same updates in less memory), {again}"
            )
        elif arm.get("status") == "failed":
            lines.append(f"{called} {clean(sentences.failure(arm))}. Its run folder holds the log; {again}")
    return lines


def not_learning(comparison: Comparison) -> list[str]:
    """Arms that are no better than the untuned base, by the margin."""
    lines, metric = [], facts.metric(comparison)
    base = facts.base_value(comparison)
    gains = {name: facts.gain(comparison, name) for name in facts.measured(comparison)}
    idle = [name for name, gained in gains.items() if gained is not None and gained < _margin(comparison)]
    if len(idle) > 3:
        called = fmt.listed([_called(comparison, name) for name in idle])
        return [f"{called} learned next to nothing (from {fmt.quality(base, metric)}): try other learning rates."]
    for name, arm in facts.measured(comparison).items():
        if name in idle:
            figures = f"{fmt.quality(base, metric)} before, {fmt.quality(facts.mean(arm), metric)} after"
            rate = fmt.learning_rate(arm.get("learning_rate"))
            lines.append(
                f"{_called(comparison, name)} learned next to nothing ({figures}): try another learning rate "
                f"(now {rate}), other targets ({_targets(arm)}) or more than {fmt.count(arm.get('steps'))} steps."
            )
    return lines


def worse_than_full(comparison: Comparison) -> list[str]:
    """The headline arm is worse than full: its rank, targets and rate, with what this comparison shows of each."""
    name = sentences.headline_arm(comparison)
    told = sentences.describe_difference(comparison, name) if name else None
    if told is None or told.verdict != "worse" or not facts.is_peft(name, facts.arms(comparison)[name]):
        return []
    amount = f"{told.estimate.lstrip('+-')}{told.unit}"
    gap = f"{_called(comparison, name)} is {amount} worse than {_full_words(comparison, name)}"
    rest = [*_more_rank(comparison, name), *_more_targets(comparison, name), *_its_rate(comparison, name)]
    if not rest:
        return [f"{gap}. Try another learning rate, more steps, or another method."]
    return [f"{gap}. {rest[0]}", *rest[1:]]


def _more_rank(comparison: Comparison, name: str) -> list[str]:
    arm, metric = facts.arms(comparison)[name], facts.metric(comparison)
    if not arm.get("rank"):
        return []
    group = next((group for group in facts.rank_groups(comparison) if name in group), [name])
    low, high = facts.arms(comparison)[group[0]], facts.arms(comparison)[group[-1]]
    command = compare_command(comparison, pair(comparison, name), f"arms.{name}.peft.r={2 * high['rank']}")
    if len(group) == 1:
        return [f"Try a higher rank than {arm['rank']}: `{command}`."]
    gained = _better(comparison, facts.mean(high) - facts.mean(low))
    figures = ", ".join(f"rank {end['rank']} {fmt.quality(facts.mean(end), metric)}" for end in (low, high))
    if gained > _margin(comparison):
        return [f"Higher ranks helped ({figures}): try the next, `{command}`."]
    return [f"A higher rank did not help ({figures}): look at the targets and the learning rate instead."]


def _more_targets(comparison: Comparison, name: str) -> list[str]:
    arm, metric = facts.arms(comparison)[name], facts.metric(comparison)
    mine = set(arm.get("target_modules") or [])
    if not mine:
        return []
    for other_name, other in facts.measured(comparison).items():
        more = set(other.get("target_modules") or []) - mine
        if (
            facts.is_peft(other_name, other)
            and more
            and mine < set(other["target_modules"])
            and other.get("rank") == arm.get("rank")
        ):
            figures = f"{fmt.quality(facts.mean(arm), metric)} to {fmt.quality(facts.mean(other), metric)}"
            added = clean(", ".join(sorted(map(str, more))))
            if _better(comparison, facts.mean(other) - facts.mean(arm)) > _margin(comparison):
                return [
                    f"More targets helped: adapting {added} too took it from {figures} "
                    f"({_called(comparison, other_name)})."
                ]
            return [f"More targets did not help: adapting {added} too went from {figures}."]
    if any(set(row.group("all-linear")) == mine for row in ARCHITECTURES.values()):
        return []  # there are no more, the CNN's convolutions apart
    return [f"Adapt more modules than {_targets(arm)}: attention and mlp together usually come nearest to full."]


def _its_rate(comparison: Comparison, name: str) -> list[str]:
    arm, full = facts.arms(comparison)[name], facts.arms(comparison).get(facts.reference(comparison, name) or "")
    ratio = facts.ratio(arm, full, "learning_rate")
    if ratio is None or ratio >= USUAL_RATE_RATIO / 2:
        return []
    rate = fmt.learning_rate(full["learning_rate"] * USUAL_RATE_RATIO)
    command = compare_command(comparison, pair(comparison, name), f"arms.{name}.learning_rate={rate}")
    return [
        f"Its learning rate, {fmt.learning_rate(arm['learning_rate'])}, is {fmt.times(ratio)} full's; an adapter's "
        f"best is often about ten times full's. Compare on the validation split: `{command}`."
    ]


def more_evidence(comparison: Comparison) -> list[str]:
    """More seeds where the headline's verdict is open, or rests on one seed."""
    name = sentences.headline_arm(comparison)
    found = facts.difference(comparison, name) if name else None
    if found is None:
        return []
    done = facts.seeds_done(facts.arms(comparison)[name])
    command = compare_command(comparison, None, seeds=max(3, done + 2))
    told = sentences.describe_difference(comparison, name)
    if told.verdict == "not shown":
        half, margin = (found["ci95"][1] - found["ci95"][0]) / 2, _margin(comparison)
        evidence = f"{done} seed{'' if done == 1 else 's'} and {fmt.count(found.get('examples'))} test examples"
        need = math.ceil((half / margin) ** 2) if margin else 0
        wanted = f" About {need} times the evidence would bring it within {told.margin}." if 1 < need <= 100 else ""
        return [
            f"Nothing is shown for {_called(comparison, name)} yet: with {evidence} the interval runs from "
            f"{told.interval}{told.unit}.{wanted} More seeds: `{command}`."
        ]
    if done == 1:
        return [f"The verdict rests on one seed; more say how much of it is luck: `{command}`."]
    return []


def length_of_training(comparison: Comparison) -> list[str]:
    """Validation still getting better at the last step, or better earlier than at the end; headline arm and full."""
    lines, metric = [], facts.metric(comparison)
    for name in dict.fromkeys([sentences.headline_arm(comparison), facts.reference(comparison)]):
        points = curve(facts.arms(comparison).get(name) or {}, "validation")
        if len(points) < 3:
            continue
        called, (last_step, last), (before_step, before) = _called(comparison, name), points[-1], points[-2]
        rise = _better(comparison, last - before)
        best_step, best = max(points, key=lambda point: _better(comparison, point[1]))
        whole = _better(comparison, last - points[0][1])
        if best_step == last_step and rise > _margin(comparison) / 4 and rise > 0.1 * whole:
            command = compare_command(comparison, None, f"training.max_steps={2 * round(last_step)}")
            lines.append(
                f"{called} was still getting better on validation at the end ({fmt.quality(before, metric)} at step "
                f"{before_step:g}, {fmt.quality(last, metric)} at step {last_step:g}): give all arms more "
                f"steps, `{command}`."
            )
        elif _better(comparison, best - last) > _margin(comparison):
            lines.append(
                f"{called} was best on validation at step {best_step:g} ({fmt.quality(best, metric)}) and ended at "
                f"{fmt.quality(last, metric)}: it trained too long, or at too high a rate."
            )
    return lines[:1]


def memory_limit(comparison: Comparison) -> list[str]:
    """An arm whose peak comes near what the machine has."""
    environment = comparison.get("environment") or {}
    limit = next((facts.number(environment[key]) for key in MEMORY_FIELDS if facts.number(environment.get(key))), None)
    peaks = {name: facts.number(arm.get("peak_memory_bytes")) or 0 for name, arm in facts.measured(comparison).items()}
    if not limit or not peaks:
        return []
    name = max(peaks, key=peaks.get)
    if peaks[name] < NEAR_LIMIT * limit:
        return []
    return [
        f"{_called(comparison, name)} took {fmt.human_bytes(peaks[name])} of this machine's {fmt.human_bytes(limit)}: "
        "before longer texts or a larger model, halve `training.per_device_train_batch_size` and double "
        "`training.gradient_accumulation_steps`."
    ]


def forgotten(comparison: Comparison) -> list[str]:
    """The headline arm lost more than the margin on an extra set."""
    name, metric = sentences.headline_arm(comparison), facts.metric(comparison)
    if name is None:
        return []
    lines, against = [], facts.reference(comparison, name)
    for split in facts.extra_splits(comparison):
        lost = -(facts.gain(comparison, name, split) or 0)
        if lost > _margin(comparison):
            kept = facts.gain(comparison, against, split) if against and against != name else None
            beside = "" if kept is None else f" ({_full_words(comparison, name)} {_lost(-kept, metric)})"
            lines.append(
                f"{_called(comparison, name)} {_lost(lost, metric)} on {clean(split)}{beside}: mix some "
                f"{clean(split)} examples into the training data, or switch the adapter off where it isn't needed."
            )
    return lines


def serving(comparison: Comparison) -> list[str]:
    """An adapter that slows answers down, when merging doesn't."""
    name = sentences.headline_arm(comparison)
    arm = facts.arms(comparison).get(name or "") or {}
    latency = arm.get("latency_ms") or {}
    own, merged = facts.number(latency.get("adapter")), facts.number(latency.get("merged"))
    if own is None or not merged or own < 1.1 * merged:
        return []
    return [
        f"Merge before serving (PEFT's `merge_and_unload`): an answer takes {fmt.milliseconds(own)} with the adapter "
        f"and {fmt.milliseconds(merged)} merged."
    ]


def when_it_works(comparison: Comparison) -> list[str]:
    """The headline arm is as good as full or better: save more."""
    name = sentences.headline_arm(comparison)
    told = sentences.describe_difference(comparison, name) if name else None
    arm = facts.arms(comparison).get(name or "") or {}
    if told is None or told.verdict not in ("equivalent", "better") or not facts.is_peft(name, arm):
        return []
    lines, smaller = [], (arm.get("rank") or 0) // 2
    if smaller and not any(name in group for group in facts.rank_groups(comparison)):
        command = compare_command(comparison, pair(comparison, name), f"arms.{name}.peft.r={smaller}")
        lines.append(f"Half the rank may do as well, at half the checkpoint: `{command}`.")
    return lines


def real_data(comparison: Comparison) -> list[str]:
    """Embedded stand-ins: the command for the real model and data."""
    if not comparison.get("embedded"):
        return []
    return [f"These are stand-ins. On the recipe's own model and data: `{on_real_data(comparison)}`."]


RULES = (
    failed_arms, not_learning, worse_than_full, more_evidence, memory_limit, length_of_training, real_data, forgotten,
    serving,
    when_it_works,
)  # fmt: skip


def _called(comparison: Comparison, name: str) -> str:
    return clean(facts.label(comparison, name))


def _better(comparison: Comparison, amount: float) -> float:
    """`amount` turned so that more is better."""
    return amount if comparison.get("higher_is_better", True) else -amount


def _margin(comparison: Comparison) -> float:
    return abs(facts.number(comparison.get("margin")) or 0.0)


def _lost(lost: float, metric: str) -> str:
    """A change in words instead of a sign: "lost 1.9 points", "gained 0.021"."""
    return f"{'gained' if lost < 0 else 'lost'} {sentences.change(abs(lost), metric).lstrip('+')}"


def _targets(arm: dict) -> str:
    targets = [clean(target) for target in arm.get("target_modules") or []]
    return f"now {fmt.listed(targets[:8])}{' and more' if len(targets) > 8 else ''}" if targets else "none named"


def _full_words(comparison: Comparison, name: str) -> str:
    against = facts.reference(comparison, name)
    if against is None:
        return "what it was held against"
    return sentences.FULL_NAME if facts.is_full(against, facts.arms(comparison)[against]) else clean(against)
