"""The lines below a report's table: what several comparisons mean for the verdicts, the judge, failed checks."""

from __future__ import annotations

from peft_recipes.reporting import facts
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.sentences import FULL_NAME, mentioned

CHECK_FAILED = "†"  # marks an arm whose figures are kept, but of which a check failed after training


def verdicts(comparison: Comparison) -> list[str]:
    """Return what the verdicts rest on: the plan of seeds, several comparisons, the judge."""
    return [*planned(comparison), *several(comparison), *judged(comparison)]


def several(comparison: Comparison) -> list[str]:
    """Return what several comparisons with full mean for the verdicts; nothing for a single one."""
    entries = {name: facts.difference(comparison, name) for name in facts.arms(comparison)}
    entries = {name: entry for name, entry in entries.items() if (entry or {}).get("ci95_simultaneous")}
    if len(entries) < 2:
        return []
    count, chance = len(entries), 1 - 0.95 ** len(entries)
    changed = [
        f"{mentioned(comparison, name)} is {entry['verdict_simultaneous']} instead of {entry['verdict']}"
        for name, entry in entries.items()
        if entry["verdict_simultaneous"] != entry["verdict"]
    ]
    result = fmt.listed(changed) if changed else "every verdict is the same"
    return [
        f"{count} arms are compared with {FULL_NAME}, and the table shows the 95 % interval of each "
        f"comparison by itself: were all arms equal to it, the chance of at least one false verdict would be up to "
        f"{100 * chance:.0f} %. With intervals that hold for all {count} together (Bonferroni), {result}."
    ]


def planned(comparison: Comparison) -> list[str]:
    """Return the plan of seeds that were added until it was decided, and how it ended; nothing for fixed seeds."""
    design = comparison.get("design")
    if not design:
        return []
    seeds, decided = comparison.get("seeds") or [], design["decided"]
    open_arms = [name for name in design["arms"] if name != "full" and name not in decided]
    named = fmt.listed([mentioned(comparison, name) for name in open_arms])
    is_open = f"{named} {'is' if len(open_arms) == 1 else 'are'} open"
    why = {
        "decided": "every arm is decided",
        "max-seeds": f"the most planned; {is_open}",
        "budget": f"the next would not have ended within the time; {is_open}",
        "stopped": f"arms were stopped; {is_open}",
        "failed": f"runs failed; {is_open}",
    }
    still = bool(comparison.get("provisional"))
    ended = f"It ended after {len(seeds)} seed{'s' * (len(seeds) != 1)}: {why.get(design['ended'], is_open)}."
    lines = [
        f"Seeds {'are' if still else 'were'} added until it {'is' if still else 'was'} decided, by a plan made before "
        f"the first run: at most {len(design['seeds'])} seeds, and a look after each from number {design['first']}. "
        f"Each 95 % interval holds over all looks (alpha spending), so looking again makes no more false claims. "
        f"{_looked(design, is_open if open_arms else 'every arm is decided') if still else ended}"
    ]
    if not still and len(seeds) < design["first"]:
        lines.append(f"There is no interval before the first look, at {design['first']} seeds.")
    if any(entry["seeds"] < len(seeds) for entry in decided.values()):
        lines.append("An arm that is decided gets no more seeds.")
    if before := design.get("finished_before"):
        which = f"Seed{'s' * (len(before) != 1)} {fmt.listed([str(seed) for seed in before])}"
        lines.append(f"{which} {'was' if len(before) == 1 else 'were'} finished before the plan was made.")
    if earlier := design.get("earlier_looks"):
        lines.append(f"An earlier plan of these arms was looked at {earlier} time{'s' * (earlier != 1)}, and replaced.")
    return [" ".join(lines)]


def _looked(design: dict, found: str) -> str:
    """Return what the looks of a plan that still runs have found: the verdicts of the table are theirs alone."""
    made = [seed for seed in design["seeds"] if any(seed in seeds for seeds in design.get("seeds_of", {}).values())]
    if len(made) < design["first"]:
        return f"The first look is at {design['first']} seeds; before it there is no interval and no verdict."
    return (
        f"The last look was at {len(made)} seeds: {found}. Intervals and verdicts are those of that look; those of an "
        "open arm hold for all arms together, and later seeds are in the means alone."
    )


def judged(comparison: Comparison) -> list[str]:
    """Return who judged the answers, how biased, and the wins, ties and losses of each arm; nothing without a judge."""
    judge = comparison.get("judge")
    if not judge:
        return []
    total, share = judge["total"], judge["first_position_share"]
    replies = sum(total.get(reply, 0) for reply in ("first", "second", "tie", "invalid"))
    where = " at an endpoint" if judge["endpoint"] else ""
    template = ", with the recipe's own template" if judge["own_template"] else ""
    lines = [
        f"Answers judged by {facts.plain(judge['model'])}{where}{template}, each pair in both orders; an answer wins "
        "if it is preferred in both."
    ]
    if share is not None:
        lines[0] += (
            f" Where the judge preferred one, it was the first in {fmt.percent(share)} (50 %: no position bias)."
        )
    if replies:
        lines[0] += f" {fmt.count(total['invalid'])} of {fmt.count(replies)} replies were invalid."
    for name, arm in judge["arms"].items():
        label = mentioned(comparison, name) if name in facts.arms(comparison) else "the untuned base"
        lines.append(
            f"{label[:1].upper()}{label[1:]} against {FULL_NAME}: {_counted(arm['wins'], 'win')}, "
            f"{_counted(arm['ties'], 'tie')}{_reasons(arm)} and {_counted(arm['losses'], 'loss', 'losses')}."
        )
    return lines


def _reasons(arm: dict[str, int]) -> str:
    """Return the known reasons of an arm's ties, in brackets."""
    reasons = {
        "identical": "of equal answers",
        "contradictions": "where the judge contradicted itself",
        "unreadable": "with an invalid reply",
    }
    parts = [f"{fmt.count(arm[key])} {words}" for key, words in reasons.items() if arm.get(key)]
    return f" ({', '.join(parts)})" if parts else ""


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{fmt.count(number)} {one if number == 1 else many or f'{one}s'}"


def failed_checks(comparison: Comparison) -> list[str]:
    """Return a line for each check that failed after training; the row of its arm is marked in the table."""
    lines = []
    base = comparison.get("base") or {}
    named = [("The base", base), *((facts.label(comparison, n), arm) for n, arm in facts.arms(comparison).items())]
    for label, entry in named:
        for failed in entry.get("failed_checks") or []:
            words = facts.shorten(str(failed.get("error")), 400).rstrip(".")
            lines.append(
                f"{CHECK_FAILED} {label}, seed {failed.get('seed')}: the check '{facts.plain(failed.get('check'))}' "
                f"failed after training: {words}. Its figures are those of the trained model."
            )
    return lines
