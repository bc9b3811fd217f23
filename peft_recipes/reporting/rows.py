"""The table of a comparison as data: one list of columns, one row for the base and one for each arm.

The terminal, Markdown, the HTML page and `Comparison.to_pandas()` all draw from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft_recipes.reporting import facts, rank_sentences, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison

SYMBOLS = {"equivalent": "≈", "better": "▲", "worse": "▼", "not shown": "?"}  # shape says it, colour only repeats it


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, and a second, quieter line (a spread, a share of full's)."""

    text: str = fmt.NOTHING
    sub: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.sub})" if self.sub else self.text


@dataclass(frozen=True)
class Column:
    """A column: `meaning` is its definition in one line; a low `priority` stays where the table must be narrow."""

    key: str
    title: str
    meaning: str
    priority: int
    cell: Callable[[Comparison, str], Cell]
    short: str = ""


@dataclass
class Row:
    """A row: `kind` is base, arm or failed; a failed row has a `reason` instead of figures."""

    name: str
    label: str
    kind: str
    cells: dict[str, Cell] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Table:
    """Columns that have at least one value, and all rows."""

    columns: list[Column]
    rows: list[Row]


def table(comparison: Comparison) -> Table:
    """The comparison's table: the untuned base on top, then every arm in the recipe's order, failed ones with why."""
    columns = _columns(comparison)
    rows = [_base_row(comparison)] if comparison.get("base") else []
    rows += [_arm_row(comparison, name, columns) for name in facts.arms(comparison)]
    used = [column for column in columns if any(_filled(row.cells.get(column.key)) for row in rows)]
    return Table(used, rows)


def _filled(cell: Cell | None) -> bool:
    return cell is not None and cell.text != fmt.NOTHING


def _arm_row(comparison: Comparison, name: str, columns: list[Column]) -> Row:
    arm, label = facts.arms(comparison)[name], facts.label(comparison, name)
    if facts.mean(arm) is None:
        return Row(name, label, "failed", reason=sentences.failure(arm))
    return Row(name, label, "arm", {column.key: column.cell(comparison, name) for column in columns})


def _base_row(comparison: Comparison) -> Row:
    base, metric = comparison["base"], facts.metric(comparison)
    cells = {"metric": Cell(fmt.quality(facts.base_value(comparison), metric))}
    cells["likelihood"] = _likelihood(base)
    for split in facts.extra_splits(comparison):
        cells[f"split:{split}"] = Cell(fmt.quality(facts.base_value(comparison, split), metric))
    for key, shown in (("latency_ms", fmt.milliseconds), ("generation_tokens_per_second", fmt.rate)):
        figures = [
            (arm.get(key) or {}).get("base")
            for name, arm in facts.measured(comparison).items()
            if facts.is_peft(name, arm)
        ]
        cells[key.removesuffix("_tokens_per_second")] = Cell(shown(next(iter(figures), None)))
    reason = facts.telling_line(base.get("error")) if base.get("status", "ok") != "ok" else ""
    return Row("base", "Base, untuned", "failed" if reason else "base", cells, reason)


MEANINGS = {
    "metric": "mean over seeds on the test split, which is used once, at the end; ± one standard deviation over seeds",
    "preference_accuracy": "share of test pairs whose chosen answer the arm favours, against the untrained base, more "
    "than the rejected one; a tie counts half, so the base itself is at 50 % by definition; mean over seeds",
    "likelihood": "share of test pairs whose chosen answer the model gives the higher log-probability a token, "
    "whatever the base says",
    "difference": "arm minus full, paired by test example and seed; 95 % interval by bootstrap over examples and seeds",
    "ranks": "the rank minus the one that is best on the validation split, paired likewise; enough: the smallest rank "
    "whose interval excludes that it is worse by more than the margin",
    "trainable_parameters": "parameters that learn, adapter and new head; beside it their part of the base's",
    "training_seconds": "sum of optimiser-step times, median over seeds, without the first 3 steps, loading, "
    "evaluation and saving; beside it the speed against full",
    "peak_memory_bytes": "highest during the training steps: allocated on a GPU, resident on a CPU; beside it the "
    "part of full's, and what the plan had estimated",
    "checkpoint_bytes": "bytes on disk that restore the arm on top of the base, measured; beside it the part of full's",
    "tokens": "non-padding tokens trained on a second; beside it padding's part of the computed positions",
    "examples": "examples trained on a second; beside it padding's part of the computed positions",
    "latency_ms": "median at batch 1 after warm-up, with the adapter; beside it merged",
    "generation": "greedy generation with the adapter; beside it merged",
    "learning_rate": "the arm's own",
}


def _columns(comparison: Comparison) -> list[Column]:
    name = fmt.metric_title(facts.metric(comparison))
    means, splits = MEANINGS, facts.extra_splits(comparison)
    sequences = comparison.get("task") in ("sft", "language-modeling", "dpo")
    unit, title, shown = ("tokens", "Tokens/s", _tokens) if sequences else ("examples", "Examples/s", _examples)
    said = means.get(facts.metric(comparison), means["metric"])
    return [
        Column("metric", f"Test {name}", said, 0, _metric, name.capitalize()),
        Column("difference", "Against full", means["difference"], 1, _difference),
        Column("verdict", "Verdict", _verdict_meaning(comparison), 1, _verdict),
        *(_split_column(split, name) for split in splits),
        Column("likelihood", "Chosen is likelier", means["likelihood"], 4, lambda c, arm: _likelihood(_arm(c, arm))),
        Column("ranks", "Against the best rank", means["ranks"], 4, _rank, "Best rank"),
        Column("trainable_parameters", "Trained parameters", means["trainable_parameters"], 2, _parameters, "Trained"),
        Column("training_seconds", "Training time", means["training_seconds"], 3, _time, "Time"),
        Column("peak_memory_bytes", "Peak memory", means["peak_memory_bytes"], 2, _memory, "Memory"),
        Column("checkpoint_bytes", "Checkpoint", means["checkpoint_bytes"], 2, _checkpoint),
        Column("throughput", title, means[unit], 6, shown),
        Column("latency_ms", "Latency", means["latency_ms"], 6, _latency),
        Column("generation", "Generated tokens/s", means["generation"], 6, _generation, "Gen. tok/s"),
        Column("learning_rate", "Learning rate", means["learning_rate"], 7, _rate, "Rate"),
    ]


def _split_column(split: str, name: str) -> Column:
    """The metric on an extra set, such as `clean`."""
    shown = facts.plain(split)
    meaning = f"{name} on the set '{shown}', to see what tuning made the model forget; beside it the change from base"
    return Column(f"split:{split}", f"{shown.capitalize()} {name}", meaning, 2, lambda c, arm: _split(c, arm, split))


def _verdict_meaning(comparison: Comparison) -> str:
    told = (sentences.describe_difference(comparison, name) for name in facts.arms(comparison))
    margin = next((difference.margin for difference in told if difference), "the margin")
    return (
        f"equivalent: the interval lies within {margin}; better or worse: it lies on one side of zero and not within "
        "the margin; else not shown"
    )


def _arm(comparison: Comparison, name: str) -> dict:
    return facts.arms(comparison)[name]


def _full(comparison: Comparison, name: str) -> dict | None:
    """The reference arm; None for the reference itself, so that it isn't compared with itself."""
    against = facts.reference(comparison, name)
    return facts.arms(comparison)[against] if against and against != name else None


def _metric(comparison: Comparison, name: str) -> Cell:
    arm, metric = _arm(comparison, name), facts.metric(comparison)
    deviation = facts.spread(arm)
    if deviation is None:
        return Cell(fmt.quality(facts.mean(arm), metric))
    shown = f"{100 * deviation:.1f}" if fmt.is_share(metric) else f"{deviation:.3f}"
    return Cell(fmt.quality(facts.mean(arm), metric), f"± {shown}")


def _difference(comparison: Comparison, name: str) -> Cell:
    told = sentences.describe_difference(comparison, name)
    return Cell(f"{told.estimate}{told.unit}", told.interval) if told else Cell()


def _verdict(comparison: Comparison, name: str) -> Cell:
    told = sentences.describe_difference(comparison, name)
    return Cell(told.verdict) if told else Cell()


def _rank(comparison: Comparison, name: str) -> Cell:
    found = rank_sentences.of_arm(comparison, name)
    if found is None:
        return Cell()
    group, told = found
    enough = "enough" if name == group["enough"] else ""
    if told is None:
        return Cell("best", enough)
    return Cell(f"{told.estimate}{told.unit}", f"{told.interval}{enough and ', enough'}")


def _split(comparison: Comparison, name: str, split: str) -> Cell:
    metric, before = facts.metric(comparison), facts.base_value(comparison, split)
    after = facts.split_value(_arm(comparison, name), split, metric)
    moved = sentences.change(after - before, metric) if after is not None and before is not None else ""
    moved = moved.removesuffix(" points")
    return Cell(fmt.quality(after, metric), moved)


def _likelihood(row: dict) -> Cell:
    """Of preferences: how often the chosen answer is the likelier one."""
    return Cell(fmt.quality(((row.get("metrics") or {}).get("test") or {}).get("likelihood_accuracy"), "accuracy"))


def _parameters(comparison: Comparison, name: str) -> Cell:
    share = facts.parameter_share(_arm(comparison, name))
    return Cell(
        fmt.count(_arm(comparison, name).get("trainable_parameters")), fmt.percent(share) if share is not None else ""
    )


def _rate(comparison: Comparison, name: str) -> Cell:
    return Cell(fmt.learning_rate(_arm(comparison, name).get("learning_rate")))


def _time(comparison: Comparison, name: str) -> Cell:
    arm = _arm(comparison, name)
    speed = facts.ratio(_full(comparison, name), arm, "training_seconds")
    return Cell(fmt.seconds(arm.get("training_seconds")), fmt.times(speed) if speed is not None else "")


def _share_of_full(comparison: Comparison, name: str, key: str) -> Cell:
    arm = _arm(comparison, name)
    share = facts.ratio(arm, _full(comparison, name), key)
    return Cell(fmt.human_bytes(arm.get(key)), fmt.percent(share) if share is not None else "")


def _memory(comparison: Comparison, name: str) -> Cell:
    cell = _share_of_full(comparison, name, "peak_memory_bytes")
    planned = facts.number((_arm(comparison, name).get("estimated_memory") or {}).get("total"))
    if planned is None:
        return cell
    return Cell(cell.text, f"{cell.sub}, plan {fmt.human_bytes(planned)}".removeprefix(", "))


def _checkpoint(comparison: Comparison, name: str) -> Cell:
    return _share_of_full(comparison, name, "checkpoint_bytes")


def _examples(comparison: Comparison, name: str) -> Cell:
    return Cell(fmt.rate(_arm(comparison, name).get("examples_per_second")), _padding(comparison, name))


def _tokens(comparison: Comparison, name: str) -> Cell:
    return Cell(fmt.rate(_arm(comparison, name).get("tokens_per_second")), _padding(comparison, name))


def _padding(comparison: Comparison, name: str) -> str:
    share = facts.number(_arm(comparison, name).get("padding_share"))
    return f"{fmt.percent(share)} padding" if share is not None else ""


def _latency(comparison: Comparison, name: str) -> Cell:
    return _served(_arm(comparison, name).get("latency_ms"), fmt.milliseconds)


def _generation(comparison: Comparison, name: str) -> Cell:
    return _served(_arm(comparison, name).get("generation_tokens_per_second"), fmt.rate)


def _served(figures: dict | None, shown: Callable[[Any], str]) -> Cell:
    """With the adapter, merged beside it; an arm without an adapter (full) has its figure under `base`."""
    figures = figures or {}
    own = figures.get("adapter") if facts.number(figures.get("adapter")) is not None else figures.get("base")
    merged = facts.number(figures.get("merged"))
    return Cell(shown(own), f"merged {shown(merged).removesuffix(' ms')}" if merged is not None else "")


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """The table's raw numbers, one flat dict a row (for pandas): None where there is no value, the base first."""
    metric = facts.metric(comparison)
    splits = facts.extra_splits(comparison)
    found = []
    if comparison.get("base"):
        base = comparison["base"]
        found.append({
            "arm": "base", "label": "Base, untuned", "status": base.get("status", "ok"),
            metric: facts.base_value(comparison),
            **{f"{split}_{metric}": facts.base_value(comparison, split) for split in splits},
            "total_parameters": facts.number(base.get("total_parameters")),
        })  # fmt: skip
    for name, arm in facts.arms(comparison).items():
        told = facts.difference(comparison, name) or {}
        low, high = told.get("ci95") or (None, None)
        found.append({
            "arm": name, "label": facts.label(comparison, name), "status": arm.get("status", "ok"),
            metric: facts.mean(arm),
            **{f"{split}_{metric}": facts.split_value(arm, split, metric) for split in splits},
            "sd": facts.spread(arm), "seeds": facts.seeds_done(arm), "against": told.get("against"),
            "difference": told.get("estimate"), "ci95_low": low, "ci95_high": high, "verdict": told.get("verdict"),
            "method": arm.get("method"), "rank": arm.get("rank"),
            **{key: facts.number(arm.get(key)) for key in _FIGURES},
            "latency_ms": facts.number((arm.get("latency_ms") or {}).get("adapter")),
            "latency_merged_ms": facts.number((arm.get("latency_ms") or {}).get("merged")),
            "error": sentences.failure(arm) if facts.mean(arm) is None else None,
        })  # fmt: skip
    keys = list(dict.fromkeys(key for record in reversed(found) for key in record))
    return [{key: record.get(key) for key in keys} for record in found]


_FIGURES = (
    "trainable_parameters", "total_parameters", "checkpoint_bytes", "peak_memory_bytes", "learning_rate", "steps",
    "training_seconds", "examples_per_second", "tokens_per_second",
)  # fmt: skip
