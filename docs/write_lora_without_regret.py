"""Write docs/lora-without-regret.md from the results of benchmarks/lora_without_regret.py. `make readme` runs it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.sentences import describe_difference

PAGE = Path(__file__).with_name("lora-without-regret.md")
FIGURES = Path(__file__).parent.parent / "benchmarks" / "lora_without_regret"
RECIPES = ("mnist-shift", "gpt2-sms-spam", "distilbert-imdb")  # recipes that the page covers or lists as missing
NEIGHBOUR = 3.0  # the factor between two learning rates, as in the script


def kept() -> list[dict[str, Any]]:
    """The results that are kept."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FIGURES.glob("*.json"))]


_WORDS = {
    "equivalent": "matches it",
    "better": "beats it",
    "worse": "is worse",
    "not shown": "is not shown to match it",
    "failed": "failed",
}


def outcome(result: dict[str, Any]) -> str:
    """The result of one recipe in two sentences."""
    ratio = result["best"]["lora"] / result["best"]["full"]
    ten = f"({_rate(result, 'at_ten_times')}) LoRA {_verdict(result, 'at_ten_times')}."
    parts = [f"At ten times full's best learning rate {ten}"]
    if result["at_its_best"]["learning_rate"] == result["at_ten_times"]["learning_rate"]:
        parts.append("Its own best on the validation split is the same.")
    else:
        best = f"{_rate(result, 'at_its_best')}, {ratio:.2g} times full's"
        parts.append(f"Its own best learning rate is {best}: there it {_verdict(result, 'at_its_best')}.")
    return " ".join(parts)


def _rate(result: dict[str, Any], where: str) -> str:
    return fmt.learning_rate(result[where]["learning_rate"])


def _verdict(result: dict[str, Any], where: str) -> str:
    test = result[where]
    if test["verdict"] == "failed":
        return f"failed ({test['error']})"
    return f"{_WORDS[test['verdict']]} ({_difference(result, where)})"


def _difference(result: dict[str, Any], where: str) -> str:
    """The difference in the words of the reports."""
    best = next(row for row in result["full"] if row["learning_rate"] == result["best"]["full"])
    comparison = {
        "metric": result["metric"],
        "margin": result["margin"],
        "arms": {"full": {"method": "full", "metric": {"mean": statistics.fmean(best["test"])}},
                 "lora": {"method": "LORA", "metric": {"mean": result[where]["mean"]}}},
        "differences": {"lora": {"against": "full", **result[where]}},
    }  # fmt: skip
    return str(describe_difference(comparison, "lora"))


def page(results: list[dict[str, Any]]) -> str:
    """The text of docs/lora-without-regret.md."""
    seeds = sorted({len(result["seeds"]) for result in results})
    lines = [
        "# LoRA without regret, tested on our recipes",
        "",
        "The claim ([LoRA Without Regret](https://thinkingmachines.ai/blog/lora/), Schulman and Thinking Machines Lab, "
        "2025; trl has a page of that name): LoRA on all linear layers, at about ten times full fine-tuning's learning "
        "rate, matches full fine-tuning on small and medium data.",
        "",
        f"The test: LoRA r={_same(results, 'rank')}, alpha={_same(results, 'alpha')}, on every linear (and "
        f"convolutional) layer, compared with full fine-tuning, {' or '.join(map(str, seeds))} seeds each. Both "
        f"learning rates were searched in steps of {NEIGHBOUR:g}, further while the best was an edge, and chosen on "
        "the validation split. The intervals are of the test split, paired by example and seed, relative to full at "
        "its own best learning rate. All on embedded stand-ins: small models and little data, not the recipes' own.",
        "",
        "## What holds, what does not",
        "",
        *_missing(results),
        *_summary(results),
        "",
    ]  # fmt: skip
    for result in results:
        lines += _section(result)
    lines += [
        "## The files",
        "",
        "Written from [benchmarks/lora_without_regret](../benchmarks/lora_without_regret) by `make readme`; "
        "`python benchmarks/lora_without_regret.py RECIPE --keep` writes them.",
        "",
    ]
    return "\n".join(lines)


def _same(results: list[dict[str, Any]], key: str) -> str:
    return " or ".join(sorted({str(result[key]) for result in results}))


def _missing(results: list[dict[str, Any]]) -> list[str]:
    """A line on the recipes that were not tested yet."""
    tested = {result["recipe"] for result in results}
    missing = [name for name in RECIPES if name not in tested]
    return [f"Tested on {_names(sorted(tested))}; not yet on {_names(missing)}.", ""] if missing else []


def _summary(results: list[dict[str, Any]]) -> list[str]:
    def with_verdict(where: str, *verdicts: str) -> str:
        return _names([result["recipe"] for result in results if result[where]["verdict"] in verdicts])

    def summary(where: str) -> str:
        return (
            f"matches or beats full on {with_verdict(where, 'equivalent', 'better')}; is worse on "
            f"{with_verdict(where, 'worse', 'failed')}; neither is shown on {with_verdict(where, 'not shown')}."
        )

    ratios = [f"{f['best']['lora'] / f['best']['full']:.2g} ({f['recipe']})" for f in results]
    return [
        f"- **At ten times full's best learning rate** LoRA {summary('at_ten_times')}",
        f"- **At its own best learning rate** it {summary('at_its_best')}",
        f"- **The factor of ten**: LoRA's best learning rate was {', '.join(ratios)} times full's.",
    ]


def _names(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _section(result: dict[str, Any]) -> list[str]:
    changed = f" Changed: `{'`, `'.join(result['changes'])}`." if result["changes"] else ""
    rows, trainable, metric = result["rows"], result["trainable"], fmt.metric_title(result["metric"])
    lines = [
        f"## {result['recipe']}",
        "",
        f"{outcome(result)}",
        "",
        f"{result['title']}: {result['model']} on {result['dataset']}, {rows['train']} training examples, "
        f"{result['steps']} steps, {rows['validation']} validation and {rows['test']} test examples, "
        f"seeds {', '.join(map(str, result['seeds']))}. LoRA trains {fmt.count(trainable['lora'])} of "
        f"{fmt.count(trainable['full'])} parameters.{changed}",
        "",
        f"| arm | learning rate | validation {metric} | test {metric} |",
        "|:---|---:|---:|---:|",
    ]
    for kind in ("full", "lora"):
        for row in result[kind]:
            chosen = " (best)" if row["learning_rate"] == result["best"][kind] else ""
            ten = " (ten times)" if kind == "lora" and row["times"] == 1 else ""
            name = {"full": "full", "lora": f"LoRA r={result['rank']}"}[kind]
            lines.append(f"| {name}{ten}{chosen} | {fmt.learning_rate(row['learning_rate'])} | "
                         f"{_means(row, result, 'validation')} | {_means(row, result, 'test')} |")  # fmt: skip
    edge = [text for kind in ("full", "lora") for text in (_edge(kind, result), _luck(kind, result))]
    machine = result["environment"]
    lines += ["", *[text for text in edge if text],
              f"{machine['threads']} thread(s) of an {machine['device_name']}, {machine['precision']}, peft "
              f"{machine['versions']['peft']}, code {machine['peft_recipes']}.", ""]  # fmt: skip
    return lines


def _means(row: dict[str, Any], result: dict[str, Any], split: str) -> str:
    if row[split] is None:
        return "failed"
    values = row["test"] if split == "test" else [v[result["metric"]] for v in row["validation"]]
    return fmt.quality(statistics.fmean(values), result["metric"])


def _luck(kind: str, result: dict[str, Any]) -> str:
    """A note if another learning rate did better on the test split than the one chosen on the validation split."""
    sign = -1 if result["metric"] == "loss" else 1
    rows = [row for row in result[kind] if row["test"]]
    best = max(rows, key=lambda row: sign * statistics.fmean(row["test"]))
    if best["learning_rate"] == result["best"][kind]:
        return ""
    name = {"full": "full", "lora": "LoRA"}[kind]
    return (
        f"On the test split {name} did better at {fmt.learning_rate(best['learning_rate'])} "
        f"({_means(best, result, 'test')}), which {result['rows']['validation']} validation examples did not show; "
        "choosing it there would be selection on the test split.\n"
    )


def _edge(kind: str, result: dict[str, Any]) -> str:
    rates = [row["learning_rate"] for row in result[kind]]
    name = {"full": "Full", "lora": "LoRA"}[kind]
    if result["best"][kind] == rates[0]:
        return f"{name}'s best learning rate is the lowest tried; a lower one may be better.\n"
    if result["best"][kind] == rates[-1]:
        return f"{name}'s best learning rate is the highest tried; a higher one may be better.\n"
    return ""


if __name__ == "__main__":
    PAGE.write_text(page(kept()), encoding="utf-8")
