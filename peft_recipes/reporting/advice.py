"""Advice on what to try next, with the numbers of the comparison that it is based on.

A rule takes the comparison and returns lines of advice. Commands are between backticks.
"""

from __future__ import annotations

import math
import shlex

from peft_recipes.models.architecture_table import ARCHITECTURES
from peft_recipes.recipe.metrics import METRICS, PREFERENCE, margin_for
from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.commands import clean, compare_command, pair
from peft_recipes.reporting.curves import curve
from peft_recipes.reporting.facts import Comparison

MOST_LINES = 6
NEAR_LIMIT = 0.85  # of the machine's memory
USUAL_RATE_RATIO = 10  # best learning rate of an adapter / of full ("LoRA without regret", Thinking Machines, 2025)
MEMORY_FIELDS = ("memory_bytes", "device_memory_bytes", "total_memory_bytes")


def next_steps(comparison: Comparison) -> list[str]:
    """Return at most six lines of advice, the most urgent first; commands are between backticks."""
    rules = [failed_arms] if comparison.get("provisional") else RULES  # the others are about the finished table
    lines = [line for rule in rules for line in rule(comparison)]
    return list(dict.fromkeys(lines))[:MOST_LINES]


def failed_arms(comparison: Comparison) -> list[str]:
    """Arms that failed: why, and what to do."""
    lines = []
    for name, arm in facts.arms(comparison).items():
        if facts.mean(arm) is not None:
            continue
        label = _label(comparison, name)
        rerun = f"then `{compare_command(comparison, name)}` runs only what is missing."
        if arm.get("status") == "out-of-memory":
            lines.append(
                f"{label} ran out of memory: halve `training.per_device_train_batch_size` and double "
                f"`training.gradient_accumulation_steps` (the same updates in less memory), {rerun}"
            )
        elif arm.get("status") == "failed":
            lines.append(
                f"{label} {clean(sentences.failure(arm))}. Its log is in the run folder; fix the cause, {rerun}"
            )
    return lines


def not_learning(comparison: Comparison) -> list[str]:
    """Arms that are not better than the untuned base by more than the margin."""
    lines, metric = [], facts.metric(comparison)
    if metric == PREFERENCE:  # a judge compares arm and base with full, not with each other
        return []
    base = facts.base_value(comparison)
    gains = {name: facts.gain(comparison, name) for name in facts.measured(comparison)}
    idle = [name for name, gained in gains.items() if gained is not None and gained < _margin(comparison)]
    if len(idle) > 3:
        labels = fmt.listed([_label(comparison, name) for name in idle])
        return [f"{labels} learned next to nothing (from {fmt.quality(base, metric)}): try other learning rates."]
    for name, arm in facts.measured(comparison).items():
        if name in idle:
            figures = f"{fmt.quality(base, metric)} before, {fmt.quality(facts.mean(arm), metric)} after"
            rate = fmt.learning_rate(arm.get("learning_rate"))
            lines.append(
                f"{_label(comparison, name)} learned next to nothing ({figures}): try another learning rate "
                f"(now {rate}), other targets ({_targets(arm)}) or more than {fmt.count(arm.get('steps'))} steps."
            )
    return lines


def worse_than_full(comparison: Comparison) -> list[str]:
    """The headline arm is worse than full: advice on its rank, targets and learning rate."""
    name = sentences.headline_arm(comparison)
    difference = sentences.describe_difference(comparison, name) if name else None
    if difference is None or difference.verdict != "worse" or not facts.is_peft(name, facts.arms(comparison)[name]):
        return []
    amount = f"{difference.estimate.lstrip('+-')}{difference.unit}"
    gap = f"{_label(comparison, name)} is {amount} worse than {clean(sentences.reference_name(comparison, name))}"
    steps = [*_more_rank(comparison, name), *_more_targets(comparison, name), *_learning_rate(comparison, name)]
    steps = steps or ["Try another learning rate, more steps, or another method."]
    return [f"{gap}. {steps[0]}", *steps[1:]]


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
    targets = set(arm.get("target_modules") or [])
    if not targets:
        return []
    for other_name, other in facts.measured(comparison).items():
        other_targets = set(other.get("target_modules") or [])
        same = [facts.display_method(name, arm), arm.get("rank"), arm.get("quantise")]
        if facts.is_peft(other_name, other) and targets < other_targets and same == [
            facts.display_method(other_name, other), other.get("rank"), other.get("quantise")
        ]:  # fmt: skip
            change = f"from {fmt.quality(facts.mean(arm), metric)} to {fmt.quality(facts.mean(other), metric)}"
            added = clean(", ".join(sorted(map(str, other_targets - targets))))
            if _better(comparison, facts.mean(other) - facts.mean(arm)) > _margin(comparison):
                label = _label(comparison, other_name)
                return [f"More targets helped: adapting {added} too took it {change} ({label})."]
            return [f"More targets did not help: adapting {added} too took it {change}."]
    rows = ARCHITECTURES.values()
    if any(set(row.group(group)) == targets for row in rows for group in ("all-linear", "convolutions")):
        return []  # all linear layers, or all convolutions, are adapted already
    return [f"Adapt more modules ({_targets(arm)}): attention and mlp together usually come closest to full."]


def _learning_rate(comparison: Comparison, name: str) -> list[str]:
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
    """More seeds, if the verdict on the headline arm is open or rests on one seed."""
    name = sentences.headline_arm(comparison)
    entry = facts.difference(comparison, name) if name else None
    if entry is None or facts.given_up(facts.arms(comparison)[name]):
        return []
    done = facts.seeds_done(facts.arms(comparison)[name])
    command = compare_command(comparison, None, seeds=max(3, done + 2))
    difference = sentences.describe_difference(comparison, name)
    if design := comparison.get("design"):
        return _more_of_the_plan(comparison, name, design) if difference.verdict == "not shown" else []
    if difference.verdict == "not shown":
        half, margin = (entry["ci95"][1] - entry["ci95"][0]) / 2, _margin(comparison)
        evidence = f"{done} seed{'' if done == 1 else 's'} and {fmt.count(entry.get('examples'))} test examples"
        factor = math.ceil((half / margin) ** 2) if margin else 0
        needed = f" About {factor} times the evidence would bring it within {difference.margin}."
        return [
            f"The verdict on {_label(comparison, name)} is open: with {evidence} the 95 % interval is "
            f"{difference.interval}{difference.unit}.{needed if 1 < factor <= 100 else ''} More seeds: `{command}`."
        ]
    one_seed = f"The verdict rests on one seed; more seeds show the variation between them: `{command}`."
    return [one_seed] if done == 1 else []


def _more_of_the_plan(comparison: Comparison, name: str, design: dict) -> list[str]:
    """What decides an arm that a plan of seeds left open: its other seeds, or more test examples."""
    most = len(design["seeds"])
    if design["ended"] == "budget":
        command = f"{compare_command(comparison, None)} --until-decided --max-seeds {most}"
        return [f"The verdict on {_label(comparison, name)} is open, and the plan has seeds left: `{command}`."]
    return [
        f"The verdict on {_label(comparison, name)} is open after the plan's seeds. More test examples narrow the "
        "interval; `peft-recipes plan` with `--power` says how many it takes."
    ]


def length_of_training(comparison: Comparison) -> list[str]:
    """Validation still improves at the last step, or was better before; for the headline arm and full."""
    lines, metric = [], facts.selection_metric(comparison)
    known = METRICS.get(metric)
    sign = 1 if (known.higher_is_better if known else comparison.get("higher_is_better", True)) else -1
    for name in dict.fromkeys([sentences.headline_arm(comparison), facts.reference(comparison)]):
        points = curve(facts.arms(comparison).get(name) or {}, "validation")
        if len(points) < 3:
            continue
        label, (last_step, last), (before_step, before) = _label(comparison, name), points[-1], points[-2]
        margin = _margin(comparison) if metric == facts.metric(comparison) else margin_for(metric, last)
        rise = sign * (last - before)
        best_step, best = max(points, key=lambda point: sign * point[1])
        total_rise = sign * (last - points[0][1])
        if best_step == last_step and rise > margin / 4 and rise > 0.1 * total_rise:
            command = compare_command(comparison, None, f"training.max_steps={2 * round(last_step)}")
            lines.append(
                f"{label} was still getting better on validation at the end ({fmt.quality(before, metric)} at step "
                f"{before_step:g}, {fmt.quality(last, metric)} at step {last_step:g}): give all arms more "
                f"steps, `{command}`."
            )
        elif sign * (best - last) > margin:
            lines.append(
                f"{label} was best on validation at step {best_step:g} ({fmt.quality(best, metric)}) and ended at "
                f"{fmt.quality(last, metric)}: it trained too long, or with too high a learning rate."
            )
    return lines[:1]


def memory_limit(comparison: Comparison) -> list[str]:
    """An arm whose peak memory is close to the machine's."""
    environment = comparison.get("environment") or {}
    limit = next((facts.number(environment[key]) for key in MEMORY_FIELDS if facts.number(environment.get(key))), None)
    peaks = {name: facts.number(arm.get("peak_memory_bytes")) or 0 for name, arm in facts.measured(comparison).items()}
    if not limit or not peaks:
        return []
    name = max(peaks, key=peaks.get)
    if peaks[name] < NEAR_LIMIT * limit:
        return []
    return [
        f"{_label(comparison, name)} took {fmt.human_bytes(peaks[name])} of this machine's {fmt.human_bytes(limit)}: "
        "before you use longer texts or a larger model, halve `training.per_device_train_batch_size` and double "
        "`training.gradient_accumulation_steps`."
    ]


def forgotten(comparison: Comparison) -> list[str]:
    """The headline arm lost more than the margin on an extra split."""
    name = sentences.headline_arm(comparison)
    if name is None:
        return []
    lines, against = [], facts.reference(comparison, name)
    for split in facts.extra_splits(comparison):
        lost, metric = -(facts.gain(comparison, name, split) or 0), facts.shown_as(comparison, split)
        entry = (comparison.get("forgetting") or {}).get(split) or {}
        margin = facts.number(entry.get("margin"))
        if lost > (_margin(comparison) if margin is None else margin):
            gained = facts.gain(comparison, against, split) if against and against != name else None
            reference = clean(sentences.reference_name(comparison, name))
            other = "" if gained is None else f" ({reference} {_lost(-gained, metric)})"
            mixed = f"some {clean(split)} examples into the training data"
            if entry.get("benchmark"):  # trained on its own examples, it would measure nothing
                mixed = "data of its kind, not its own examples, into the training data"
            lines.append(
                f"{_label(comparison, name)} {_lost(lost, metric)} on {clean(split)}{other}: mix {mixed}, or "
                "switch the adapter off where it isn't needed."
            )
    return lines


def serving(comparison: Comparison) -> list[str]:
    """The adapter is slower than the merged model."""
    name = sentences.headline_arm(comparison)
    arm = facts.arms(comparison).get(name or "") or {}
    latency = arm.get("latency_ms") or {}
    own, merged = facts.number(latency.get("adapter")), facts.number(latency.get("merged"))
    if own is None or not merged or own < 1.1 * merged or not facts.comparable(arm, "latency_ms"):
        return []
    return [
        f"Merge before serving (PEFT's `merge_and_unload`): an answer takes {fmt.milliseconds(own)} with the adapter "
        f"and {fmt.milliseconds(merged)} merged."
    ]


def smaller_rank(comparison: Comparison) -> list[str]:
    """The headline arm is as good as full or better: try half the rank."""
    name = sentences.headline_arm(comparison)
    difference = sentences.describe_difference(comparison, name) if name else None
    arm = facts.arms(comparison).get(name or "") or {}
    if difference is None or difference.verdict not in ("equivalent", "better") or not facts.is_peft(name, arm):
        return []
    smaller = (arm.get("rank") or 0) // 2
    if not smaller or any(name in group for group in facts.rank_groups(comparison)):
        return []
    command = compare_command(comparison, pair(comparison, name), f"arms.{name}.peft.r={smaller}")
    return [f"Half the rank may be as good, with half the checkpoint: `{command}`."]


def real_data(comparison: Comparison) -> list[str]:
    """Embedded stand-ins: the command for the recipe's own model and data."""
    command = f"peft-recipes compare {shlex.quote(clean(comparison.get('recipe', 'RECIPE')))}"
    line = f"These figures are from stand-ins. With the recipe's own model and data: `{command}`."
    return [line] if comparison.get("embedded") else []


# The most urgent first.
RULES = (failed_arms, not_learning, worse_than_full, more_evidence, memory_limit, length_of_training)
RULES += (real_data, forgotten, serving, smaller_rank)


def _label(comparison: Comparison, name: str) -> str:
    return clean(facts.label(comparison, name))


def _better(comparison: Comparison, amount: float) -> float:
    """Return `amount` with the sign that makes more better."""
    return amount if comparison.get("higher_is_better", True) else -amount


def _margin(comparison: Comparison) -> float:
    return abs(facts.number(comparison.get("margin")) or 0.0)


def _lost(lost: float, metric: str) -> str:
    """Return a change in words: "lost 1.9 points", "gained 0.021"."""
    return f"{'gained' if lost < 0 else 'lost'} {sentences.change(abs(lost), metric).lstrip('+')}"


def _targets(arm: dict) -> str:
    targets = [clean(target) for target in arm.get("target_modules") or []]
    return f"now {fmt.listed(targets[:8])}{' and more' if len(targets) > 8 else ''}" if targets else "none named"
