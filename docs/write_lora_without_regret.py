"""Writes docs/lora-without-regret.md from the figures of benchmarks/lora_without_regret.py: `make readme` does."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.sentences import describe_difference

PAGE = Path(__file__).with_name("lora-without-regret.md")
FIGURES = Path(__file__).parent.parent / "benchmarks" / "lora_without_regret"
RECIPES = ("mnist-shift", "gpt2-sms-spam", "distilbert-imdb")  # that the page is to hold
NEIGHBOUR = 3.0  # the factor between two rates, as the script has it


def kept() -> list[dict[str, Any]]:
    """The figures that are there."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FIGURES.glob("*.json"))]


_WORDS = {
    "equivalent": "matches it",
    "better": "beats it",
    "worse": "is worse",
    "not shown": "is not shown to match it",
    "failed": "failed",
}


def told(found: dict[str, Any]) -> str:
    """What came of one recipe, in two sentences."""
    ratio = found["best"]["lora"] / found["best"]["full"]
    ten = f"({_rate(found, 'at_ten_times')}) LoRA {_held_words(found, 'at_ten_times')}."
    parts = [f"At ten times full's best rate {ten}"]
    if found["at_its_best"]["learning_rate"] == found["at_ten_times"]["learning_rate"]:
        parts.append("Its own best on the validation split is that same rate.")
    else:
        parts.append(f"Its own best rate is {_rate(found, 'at_its_best')}, {ratio:.2g} times full's: there it "
                     f"{_held_words(found, 'at_its_best')}.")  # fmt: skip
    return " ".join(parts)


def _rate(found: dict[str, Any], where: str) -> str:
    return fmt.learning_rate(found[where]["learning_rate"])


def _held_words(found: dict[str, Any], where: str) -> str:
    held = found[where]
    if held["verdict"] == "failed":
        return f"failed ({held['error']})"
    return f"{_WORDS[held['verdict']]} ({_difference(found, where)})"


def _difference(found: dict[str, Any], where: str) -> str:
    """The difference in the report's own words."""
    best = next(row for row in found["full"] if row["learning_rate"] == found["best"]["full"])
    comparison = {
        "metric": found["metric"],
        "margin": found["margin"],
        "arms": {"full": {"method": "full", "metric": {"mean": statistics.fmean(best["test"])}},
                 "lora": {"method": "LORA", "metric": {"mean": found[where]["mean"]}}},
        "differences": {"lora": {"against": "full", **found[where]}},
    }  # fmt: skip
    return str(describe_difference(comparison, "lora"))


def page(all_found: list[dict[str, Any]]) -> str:
    """docs/lora-without-regret.md."""
    seeds = sorted({len(found["seeds"]) for found in all_found})
    lines = [
        "# LoRA without regret, tried on our recipes",
        "",
        "The claim ([LoRA Without Regret](https://thinkingmachines.ai/blog/lora/), Schulman and Thinking Machines Lab, "
        "2025; trl has a page of that name): LoRA on all linear layers, at about ten times full fine-tuning's learning "
        "rate, matches full fine-tuning on small and medium data.",
        "",
        f"What was done: LoRA r={_same(all_found, 'rank')}, alpha={_same(all_found, 'alpha')}, on every linear (and "
        f"convolutional) layer, beside full fine-tuning, {' or '.join(map(str, seeds))} seeds each. Full's rate and "
        f"LoRA's were searched in steps of {NEIGHBOUR:g}, further while the best lay at the edge, and chosen on the "
        "validation split. The intervals are of the test split, paired by example and seed, against full at its own "
        "best rate. All of it on embedded "
        "stand-ins: small models and little data, not the recipes' own.",
        "",
        "## What holds, what does not",
        "",
        *_missing(all_found),
        *_summary(all_found),
        "",
    ]  # fmt: skip
    for found in all_found:
        lines += _section(found)
    lines += [
        "## The files",
        "",
        "Written from [benchmarks/lora_without_regret](../benchmarks/lora_without_regret) by `make readme`; "
        "`python benchmarks/lora_without_regret.py RECIPE` makes them.",
        "",
    ]
    return "\n".join(lines)


def _same(all_found: list[dict[str, Any]], key: str) -> str:
    return " or ".join(sorted({str(found[key]) for found in all_found}))


def _missing(all_found: list[dict[str, Any]]) -> list[str]:
    """What was not tried yet, so that nobody reads more out of the page than is in it."""
    there = {found["recipe"] for found in all_found}
    gone = [name for name in RECIPES if name not in there]
    return [f"Tried on {_names(sorted(there))}; not yet on {_names(gone)}.", ""] if gone else []


def _summary(all_found: list[dict[str, Any]]) -> list[str]:
    names = {word: [f["recipe"] for f in all_found if f["at_ten_times"]["verdict"] in which]
             for word, which in (("holds", ("equivalent", "better")), ("fails", ("worse", "failed")),
                                 ("open", ("not shown",)))}  # fmt: skip
    own = {word: [f["recipe"] for f in all_found if f["at_its_best"]["verdict"] in which]
           for word, which in (("holds", ("equivalent", "better")), ("fails", ("worse", "failed")),
                               ("open", ("not shown",)))}  # fmt: skip
    ratios = [f"{f['best']['lora'] / f['best']['full']:.2g} ({f['recipe']})" for f in all_found]
    return [
        f"- **At ten times full's best rate** LoRA matches or beats full on {_names(names['holds'])}; is worse on "
        f"{_names(names['fails'])}; neither is shown on {_names(names['open'])}.",
        f"- **At its own best rate** it matches or beats full on {_names(own['holds'])}; is worse on "
        f"{_names(own['fails'])}; neither is shown on {_names(own['open'])}.",
        f"- **The factor of ten**: LoRA's best rate was {', '.join(ratios)} times full's.",
    ]


def _names(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _section(found: dict[str, Any]) -> list[str]:
    changed = f" Changed: `{'`, `'.join(found['changes'])}`." if found["changes"] else ""
    trainable = found["trainable"]
    lines = [
        f"## {found['recipe']}",
        "",
        f"{told(found)}",
        "",
        f"{found['title']}: {found['model']} on {found['dataset']}, {found['rows']['train']} training examples, "
        f"{found['steps']} steps, {found['rows']['validation']} validation and {found['rows']['test']} test examples, "
        f"seeds {', '.join(map(str, found['seeds']))}. LoRA trains {fmt.count(trainable['lora'])} of "
        f"{fmt.count(trainable['full'])} parameters.{changed}",
        "",
        f"| arm | rate | validation {fmt.metric_title(found['metric'])} | test {fmt.metric_title(found['metric'])} |",
        "|:---|---:|---:|---:|",
    ]
    for kind in ("full", "lora"):
        for row in found[kind]:
            chosen = " (best)" if row["learning_rate"] == found["best"][kind] else ""
            ten = " (ten times)" if kind == "lora" and row["times"] == 1 else ""
            name = {"full": "full", "lora": f"LoRA r={found['rank']}"}[kind]
            lines.append(f"| {name}{ten}{chosen} | {fmt.learning_rate(row['learning_rate'])} | "
                         f"{_means(row, found, 'validation')} | {_means(row, found, 'test')} |")  # fmt: skip
    edge = [text for kind in ("full", "lora") for text in (_edge(kind, found), _luck(kind, found))]
    machine = found["environment"]
    lines += ["", *[text for text in edge if text],
              f"{machine['threads']} thread(s) of an {machine['device_name']}, {machine['precision']}, peft "
              f"{machine['versions']['peft']}, code {machine['peft_recipes']}.", ""]  # fmt: skip
    return lines


def _means(row: dict[str, Any], found: dict[str, Any], split: str) -> str:
    if row[split] is None:
        return "failed"
    values = row["test"] if split == "test" else [v[found["metric"]] for v in row["validation"]]
    return fmt.quality(statistics.fmean(values), found["metric"])


def _luck(kind: str, found: dict[str, Any]) -> str:
    """That another rate did better on the test split, where one did: few validation examples can't tell them apart."""
    sign = -1 if found["metric"] == "loss" else 1
    rows = [row for row in found[kind] if row["test"]]
    best = max(rows, key=lambda row: sign * statistics.fmean(row["test"]))
    if best["learning_rate"] == found["best"][kind]:
        return ""
    name = {"full": "full", "lora": "LoRA"}[kind]
    return (
        f"On the test split {name} did better at {fmt.learning_rate(best['learning_rate'])} "
        f"({_means(best, found, 'test')}), which {found['rows']['validation']} validation examples did not tell; a "
        "rate chosen there would not be a fair one.\n"
    )


def _edge(kind: str, found: dict[str, Any]) -> str:
    rates = [row["learning_rate"] for row in found[kind]]
    name = {"full": "Full", "lora": "LoRA"}[kind]
    if found["best"][kind] == rates[0]:
        return f"{name}'s best rate is the lowest that was tried; it may lie lower still.\n"
    if found["best"][kind] == rates[-1]:
        return f"{name}'s best rate is the highest that was tried; it may lie higher still.\n"
    return ""


if __name__ == "__main__":
    PAGE.write_text(page(kept()), encoding="utf-8")
