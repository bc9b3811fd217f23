"""Does LoRA on all linear layers, at ten times full's learning rate, match full fine-tuning? Tried on our recipes.

    python benchmarks/lora_without_regret.py mnist-shift            # trains; three seeds
    python benchmarks/lora_without_regret.py --write                # the page, from the figures that are there

The claim is that of "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025) and of trl's page of that name.
For each recipe: full fine-tuning at the recipe's rate and its neighbours, further while the best lies at the edge; LoRA
(r=16, alpha=32, every linear and convolutional layer) at ten times full's best rate and at its neighbours, in the same
way. Rates are chosen on the validation split; what is claimed of them comes from the test split, paired by example and
seed. Figures go to benchmarks/lora_without_regret/RECIPE.json, the page to docs/lora-without-regret.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from peft_recipes import Arm, Recipe, RecipeError, load_recipe
from peft_recipes.evidence import scores
from peft_recipes.hardware import choose, environment
from peft_recipes.quiet import quiet_libraries
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.words import describe_difference
from peft_recipes.runs import Run, read_run, run_folder, write_json, write_text
from peft_recipes.statistics import margin_for, paired_difference, verdict

HERE = Path(__file__).parent
FIGURES, PAGE = HERE / "lora_without_regret", HERE.parent / "docs" / "lora-without-regret.md"
RECIPES = ("mnist-shift", "gpt2-sms-spam", "distilbert-imdb")  # that the page is to hold
RANK, ALPHA, TIMES = 16, 32, 10
NEIGHBOUR = 3.0  # the factor between two rates
POWERS = {"full": (-1, 0, 1), "lora": (-2, -1, 0, 1)}  # of that factor: full around the recipe's, LoRA around ten times
MOST_FURTHER = 2  # steps beyond these while the best lies at the edge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", default="runs/lora-without-regret", help="where the runs go, and are found again")
    parser.add_argument("--into", default=str(FIGURES))
    parser.add_argument("--write", action="store_true", help="write the page from the figures")
    given = parser.parse_args()
    if given.recipe:
        quiet_libraries()
        found = tried(given.recipe, given.changes, [int(s) for s in given.seeds.split(",")], Path(given.runs))
        Path(given.into).mkdir(parents=True, exist_ok=True)
        write_json(Path(given.into) / f"{given.recipe}.json", found)
        print(told(found))
    if given.write:
        PAGE.parent.mkdir(exist_ok=True)
        write_text(PAGE, page(kept()))


def tried(name: str, changes: list[str], seeds: list[int], output: Path) -> dict[str, Any]:
    """Every run of one recipe, and what they say."""
    recipe = load_recipe(name, embedded=True, changes=changes)
    own = recipe.arms["full"].learning_rate
    full = _search(recipe, "full", own, seeds, output)
    best = _best(full, recipe)
    lora = _search(recipe, "lora", TIMES * best["learning_rate"], seeds, output)
    at_ten, own_best = next(row for row in lora if row["times"] == 1), _best(lora, recipe)
    margin = recipe.margin or margin_for(recipe.metric, statistics.fmean(best["test"]))
    reference = _runs(recipe, best["arm"], seeds, output)
    return {
        "recipe": name,
        "title": recipe.title,
        "model": recipe.model,
        "dataset": recipe.dataset.path,
        "changes": changes,
        "metric": recipe.metric,
        "margin": margin,
        "rows": reference[0].data["rows"],
        "steps": reference[0].data["training"]["steps"],
        "seeds": seeds,
        "rank": RANK,
        "alpha": ALPHA,
        "targets": sorted(_lora(recipe).target_modules),
        "trainable": {
            kind: _runs(recipe, row["arm"], seeds, output)[0].data["parameters"]["trainable"]
            for kind, row in (("full", best), ("lora", own_best))
        },
        "full": full,
        "lora": lora,
        "best": {"full": best["learning_rate"], "lora": own_best["learning_rate"]},
        "at_ten_times": {"learning_rate": at_ten["learning_rate"]}
        | _held(recipe, _runs(recipe, at_ten["arm"], seeds, output), reference, margin),
        "at_its_best": {"learning_rate": own_best["learning_rate"]}
        | _held(recipe, _runs(recipe, own_best["arm"], seeds, output), reference, margin),
        "environment": environment(choose(recipe.training)),
    }


def _search(recipe: Recipe, kind: str, middle: float, seeds: list[int], output: Path) -> list[dict[str, Any]]:
    """The middle rate, its neighbours, and further ones while the best lies at the edge; the rates in order."""
    rows = [_row(recipe, kind, middle, power, seeds, output) for power in POWERS[kind]]
    for _ in range(MOST_FURTHER):
        rows.sort(key=lambda row: row["learning_rate"])
        best = _best(rows, recipe)
        if best is rows[0]:
            rows.append(_row(recipe, kind, middle, rows[0]["power"] - 1, seeds, output))
        elif best is rows[-1]:
            rows.append(_row(recipe, kind, middle, rows[-1]["power"] + 1, seeds, output))
        else:
            break
    return sorted(rows, key=lambda row: row["learning_rate"])


def _row(recipe: Recipe, kind: str, middle: float, power: int, seeds: list[int], output: Path) -> dict[str, Any]:
    """One rate with every seed. A rate at which a run fails (its loss is not finite) has no figures."""
    from peft_recipes import compare

    rate = float(f"{middle * NEIGHBOUR**power:.2g}")
    name = f"{kind}-{rate:g}"
    compare(_with_arm(recipe, kind, name, rate), [name], seeds, output=output, on_progress=_say)
    runs = [run for run in _runs(recipe, name, seeds, output) if run is not None and run.ok]
    whole = len(runs) == len(seeds)
    return {
        "arm": name,
        "learning_rate": rate,
        "power": power,
        "times": NEIGHBOUR**power,
        "validation": [run.metrics["validation"] for run in runs] if whole else None,
        "test": [run.metrics["test"][recipe.metric] for run in runs] if whole else None,
    }


def _with_arm(recipe: Recipe, kind: str, name: str, rate: float) -> Recipe:
    method = "full" if kind == "full" else _lora(recipe)
    return dataclasses.replace(recipe, arms={name: Arm(method, learning_rate=rate)}, embedded={})


def _lora(recipe: Recipe) -> Any:
    """LoRA on every layer that can have one."""
    from peft import LoraConfig

    from peft_recipes.architectures import architecture_of
    from peft_recipes.models import bases

    row = architecture_of(bases.load_config(recipe))
    names = [*row.group("all-linear"), *row.group("convolutions")]
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)


def _say(news: Any) -> None:
    if news.state != "running":
        print(*news.job, news.state, news.error, flush=True)


def _runs(recipe: Recipe, arm: str, seeds: list[int], output: Path) -> list[Run]:
    return [read_run(run_folder(output, recipe, arm, seed)) for seed in seeds]


def _best(rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """The best mean on the validation split; equal ones are told apart by their loss."""
    sound = [row for row in rows if row["validation"]]
    if not sound:
        raise RecipeError(f"No rate of {recipe.name} trained without failing.")
    sign = 1 if recipe.higher_is_better else -1

    def value(row: dict[str, Any]) -> tuple[float, float]:
        metric, loss = (statistics.fmean(v[key] for v in row["validation"]) for key in (recipe.metric, "loss"))
        return sign * metric, -loss

    return max(sound, key=value)


def _held(recipe: Recipe, ours: list[Run], theirs: list[Run], margin: float) -> dict[str, Any]:
    """LoRA against full's best on the test split."""
    if not all(run.ok for run in ours):
        return {"mean": None, "verdict": "failed", "error": next(run.data["error"] for run in ours if not run.ok)}
    mine, other = ([scores(run, recipe) for run in runs] for runs in (ours, theirs))
    found = paired_difference(np.stack([s for _, s, _ in mine]), np.stack([s for _, s, _ in other]), weights=mine[0][2])
    mean = statistics.fmean(run.metrics["test"][recipe.metric] for run in ours)
    said = verdict(found, margin, recipe.higher_is_better)
    return {"mean": mean, **found.to_dict(), "margin": margin, "verdict": said}


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
        f"What was done: LoRA r={RANK}, alpha={ALPHA}, on every linear (and convolutional) layer, beside full "
        f"fine-tuning, {' or '.join(map(str, seeds))} seeds each. Full's rate and LoRA's were searched in steps of "
        f"{NEIGHBOUR:g}, further while the best lay at the edge, and chosen on the validation split. The intervals are "
        "of the test split, paired by example and seed, against full at its own best rate. All of it on embedded "
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
        "Written from [benchmarks/lora_without_regret](../benchmarks/lora_without_regret) by "
        "`python benchmarks/lora_without_regret.py --write`; the same script with a recipe's name makes them.",
        "",
    ]
    return "\n".join(lines)


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
            name = {"full": "full", "lora": f"LoRA r={RANK}"}[kind]
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
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"Error: {error}") from None
