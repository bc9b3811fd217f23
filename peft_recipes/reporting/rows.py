"""The table of a comparison as data: columns, and a row for the base and each arm.

Used by the terminal, Markdown and HTML reports and by `Comparison.to_pandas()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.recipe.options import LANGUAGE_TASKS
from peft_recipes.reporting import answer_figures, below_table, facts, provisional, rank_sentences, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.details import BASE_LABEL
from peft_recipes.reporting.facts import Comparison

DECIDES = 3  # the columns up to this priority decide: they come first, the others on demand
SYMBOLS = {"equivalent": "≈", "better": "▲", "worse": "▼", "not shown": "?"}  # readable without colour


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a second line in a smaller font (a spread, a share of full's), and a shorter text."""

    text: str = fmt.NOTHING
    sub: str = ""
    short: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.sub})" if self.sub else self.text


@dataclass(frozen=True)
class Column:
    """A column. `meaning`: a one-line definition. `priority`: narrow tables keep the lowest, with the title `short`;
    those up to `DECIDES` are shown first."""

    key: str
    title: str
    meaning: str
    priority: int
    cell: Callable[[Comparison, str], Cell]
    short: str = ""


@dataclass
class Row:
    """A row. `kind`: base, arm, failed, or pending (not finished); the last two have a `reason` instead of figures."""

    name: str
    label: str
    kind: str
    cells: dict[str, Cell] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Table:
    """The columns that have at least one value, and all rows."""

    columns: list[Column]
    rows: list[Row]

    @property
    def first(self) -> list[Column]:
        """The columns that decide: quality and costs."""
        return [column for column in self.columns if column.priority <= DECIDES]

    @property
    def more(self) -> list[Column]:
        """The other columns."""
        return [column for column in self.columns if column.priority > DECIDES]


def table(comparison: Comparison) -> Table:
    """Return the comparison's table: the untuned base, then every arm in the recipe's order, failed ones included."""
    columns = _columns(comparison)
    rows = [_base_row(comparison)] if comparison.get("base") else []
    rows += [_arm_row(comparison, name, columns) for name in facts.arms(comparison)]
    used = [c for c in columns if any(row.cells.get(c.key, Cell()).text != fmt.NOTHING for row in rows)]
    return Table(used, rows)


def _arm_row(comparison: Comparison, name: str, columns: list[Column]) -> Row:
    arm, label = facts.arms(comparison)[name], facts.label(comparison, name)
    if facts.mean(arm) is None:
        kind = "failed" if arm.get("status") in ("failed", "out-of-memory") else _without_figures(comparison, arm)
        return Row(name, label, kind, reason=sentences.no_figures(comparison, arm))
    label += f" {below_table.CHECK_FAILED}" if arm.get("failed_checks") else ""
    return Row(name, label, "arm", {column.key: column.cell(comparison, name) for column in columns})


def _without_figures(comparison: Comparison, arm: dict) -> str:
    """Return the kind of an arm's row that has neither figures nor an error."""
    return "pending" if provisional.is_unfinished(arm) or provisional.entry(comparison) else "failed"


def _base_row(comparison: Comparison) -> Row:
    base, metric = comparison["base"], facts.metric(comparison)
    adapters = [arm for name, arm in facts.measured(comparison).items() if facts.is_peft(name, arm)]

    def speed(key: str) -> Any:
        return (adapters[0].get(key) or {}).get("base") if adapters else None

    cells = {
        "metric": Cell(fmt.quality(facts.base_value(comparison), metric)),
        "likelihood": _likelihood(base),
        "latency_ms": Cell(fmt.milliseconds(speed("latency_ms"))),
        "generation": Cell(fmt.rate(speed("generation_tokens_per_second"))),
        **{f"answers:{key}": Cell(answer_figures.shown(base, key)) for key in answer_figures.figures(comparison)},
    }
    for split in facts.extra_splits(comparison):
        cells[f"split:{split}"] = Cell(
            fmt.quality(facts.base_value(comparison, split), facts.shown_as(comparison, split))
        )
    if provisional.is_unfinished(base):
        return Row("base", BASE_LABEL, "pending", reason="not evaluated yet")
    reason = facts.error_line(base.get("error")) if base.get("status", "ok") != "ok" else ""
    return Row("base", BASE_LABEL, "failed" if reason else "base", cells, reason)


MEANINGS = {
    "metric": "mean over seeds on the test split, which is used once, at the end; ± one standard deviation over seeds",
    "preference_accuracy": "share of test pairs where the arm's preference for the chosen answer over the rejected one "
    "is stronger than the untrained base's; ties count half, so the base has 50 % by definition; mean over seeds",
    PREFERENCE: "share of test prompts where the judge prefers the arm's answer to full's; ties count half: full has "
    "50 % by definition; mean over seeds",
    "preference_accuracy of reward": "share of test pairs whose chosen answer has the higher score; ties count half; "
    "mean over seeds",
    "preference_accuracy of kto": "mean over test prompts of the share of pairs whose desirable answer gains more over "
    "the untrained base than the undesirable one (of single answers: the share that gain or lose as labelled); ties "
    "count half, so the base has 50 % by definition; mean over seeds",
    "likelihood": "share of test pairs where the model gives the chosen answer the higher log-probability per token, "
    "without comparison to the base",
    "difference": "arm minus full, paired by test example and seed; 95 % interval by bootstrap over examples and "
    "seeds, of this arm by itself",
    "ranks": "the rank minus the best rank on the validation split, paired in the same way; enough: the smallest rank "
    "whose interval excludes that it is worse by more than the margin",
    "trainable_parameters": "trained parameters, including a new head; second figure: share of the base's parameters",
    "training_seconds": "sum of optimiser-step times, median over seeds, without the first 3 steps, loading, "
    "evaluation and saving; second figure: speed compared with full",
    "peak_memory_bytes": "peak during the training steps: allocated memory on a GPU, resident memory on a CPU; "
    "second figure: share of full's",
    "planned_memory": "the estimate of the peak memory before training",
    "checkpoint_bytes": "measured bytes on disk to restore the arm on top of the base; second figure: share of full's",
    "tokens": "non-padding tokens trained on per second; second figure: share of padding in the computed positions",
    "examples": "examples trained on per second; second figure: share of padding in the computed positions",
    "latency_ms": "median at batch 1 after warm-up, with the adapter; second figure: merged",
    "generation": "greedy generation with the adapter; second figure: merged",
    "learning_rate": "the arm's own learning rate",
}


def _columns(comparison: Comparison) -> list[Column]:
    metric = facts.metric(comparison)
    name, texts = fmt.metric_title(metric), MEANINGS
    meaning = texts.get(f"{metric} of {comparison.get('task')}") or texts.get(metric, texts["metric"])
    unit = "tokens" if comparison.get("task") in (*LANGUAGE_TASKS, "reward") else "examples"
    memory, checkpoint = "peak_memory_bytes", "checkpoint_bytes"
    answers = answer_figures.figures(comparison).items()
    verdict = "Verdict so far" if provisional.entry(comparison) else "Verdict"
    return [
        Column("metric", f"Test {name}", meaning, 0, _metric, fmt.capitalized(name)),
        Column("difference", "Against full", texts["difference"], 1, _difference),
        Column("verdict", verdict, _verdict_meaning(comparison), 1, _verdict),
        *(_split_column(comparison, split, index) for index, split in enumerate(facts.extra_splits(comparison))),
        Column("trainable_parameters", "Trained parameters", texts["trainable_parameters"], 2, _parameters, "Trained"),
        Column("training_seconds", "Training time", texts["training_seconds"], 2, _time, "Time"),
        Column(memory, "Peak memory", texts[memory], 2, _memory, "Memory"),
        Column(checkpoint, "Checkpoint", texts[checkpoint], 2, _checkpoint, "On disk"),
        *(_answer_column(key, title, meaning) for key, (title, meaning) in answers),
        Column("likelihood", "Chosen is likelier", texts["likelihood"], 4, lambda c, arm: _likelihood(_arm(c, arm))),
        Column("ranks", "Against the best rank", texts["ranks"], 4, _rank, "Best rank"),
        Column("planned_memory", "Planned memory", texts["planned_memory"], 5, _planned, "Plan"),
        Column("throughput", f"{unit.capitalize()}/s", texts[unit], 6, lambda c, arm: _throughput(_arm(c, arm), unit)),
        Column("latency_ms", "Latency", texts["latency_ms"], 6, _latency),
        Column("generation", "Generated tokens/s", texts["generation"], 6, _generation, "Gen. tok/s"),
        Column("learning_rate", "Learning rate", texts["learning_rate"], 7, _learning_rate, "Rate"),
    ]


def _answer_column(key: str, title: str, meaning: str) -> Column:
    def cell(comparison: Comparison, name: str) -> Cell:
        return Cell(answer_figures.shown(_arm(comparison, name), key))

    return Column(f"answers:{key}", title, f"{meaning}; mean over seeds", 4, cell)


def _split_column(comparison: Comparison, split: str, index: int) -> Column:
    """Return the column of an extra split, such as `clean`, or of a benchmark; the first is among those that decide."""
    shown, name = facts.plain(split), fmt.metric_title(facts.split_metric(comparison, split))
    priority = DECIDES if index == 0 else DECIDES + 1
    meaning = f"{name} on '{shown}', which shows what tuning made the model forget; second figure: change from the base"
    title = f"{fmt.capitalized(shown)} {name}"
    return Column(f"split:{split}", title, meaning, priority, lambda c, arm: _split(c, arm, split))


def _verdict_meaning(comparison: Comparison) -> str:
    differences = (sentences.describe_difference(comparison, name) for name in facts.arms(comparison))
    margin = next((difference.margin for difference in differences if difference), "the margin")
    return (
        f"equivalent: the interval is within {margin}; better or worse: it is on one side of zero and not within "
        "the margin; otherwise not shown"
    )


def _arm(comparison: Comparison, name: str) -> dict:
    return facts.arms(comparison)[name]


def _full(comparison: Comparison, name: str) -> dict | None:
    """Return the reference arm, or None for the reference itself."""
    against = facts.reference(comparison, name)
    return _arm(comparison, against) if against and against != name else None


def _metric(comparison: Comparison, name: str) -> Cell:
    arm, metric = _arm(comparison, name), facts.metric(comparison)
    deviation, text = facts.spread(arm), fmt.quality(facts.mean(arm), metric)
    if deviation is None:
        return Cell(text)
    return Cell(text, f"± {100 * deviation:.1f}" if fmt.is_share(metric) else f"± {deviation:.3f}")


def _difference(comparison: Comparison, name: str) -> Cell:
    difference = sentences.describe_difference(comparison, name)
    return Cell(f"{difference.estimate}{difference.unit}", difference.interval) if difference else Cell()


def _verdict(comparison: Comparison, name: str) -> Cell:
    difference = sentences.describe_difference(comparison, name)
    return Cell(difference.verdict) if difference else Cell()


def _rank(comparison: Comparison, name: str) -> Cell:
    ranked = rank_sentences.of_arm(comparison, name)
    if ranked is None:
        return Cell()
    group, difference = ranked
    enough = "enough" if name == group["enough"] else ""
    if difference is None:
        return Cell("best", enough)
    return Cell(f"{difference.estimate}{difference.unit}", f"{difference.interval}{enough and ', enough'}")


def _split(comparison: Comparison, name: str, split: str) -> Cell:
    metric, before = facts.shown_as(comparison, split), facts.base_value(comparison, split)
    after = facts.split_value(_arm(comparison, name), split, facts.split_metric(comparison, split))
    change = sentences.change(after - before, metric) if after is not None and before is not None else ""
    return Cell(fmt.quality(after, metric), change.removesuffix(" points"))


def _likelihood(entry: dict) -> Cell:
    return Cell(fmt.quality(facts.split_value(entry, "test", "likelihood_accuracy"), "accuracy"))


def _parameters(comparison: Comparison, name: str) -> Cell:
    arm = _arm(comparison, name)
    count, share = arm.get("trainable_parameters"), _known(facts.parameter_share(arm), fmt.percent)
    return Cell(fmt.count(count), share, fmt.short_count(count))


def _known(value: float | None, show: Callable[[Any], str]) -> str:
    return "" if value is None else show(value)


def _learning_rate(comparison: Comparison, name: str) -> Cell:
    return Cell(fmt.learning_rate(_arm(comparison, name).get("learning_rate")))


def _time(comparison: Comparison, name: str) -> Cell:
    arm = _arm(comparison, name)
    speedup = facts.ratio(_full(comparison, name), arm, "training_seconds")
    return Cell(fmt.seconds(arm.get("training_seconds")), _known(speedup, fmt.times))


def _share_of_full(comparison: Comparison, name: str, key: str) -> Cell:
    arm = _arm(comparison, name)
    return Cell(fmt.human_bytes(arm.get(key)), _known(facts.ratio(arm, _full(comparison, name), key), fmt.percent))


def _memory(comparison: Comparison, name: str) -> Cell:
    return _share_of_full(comparison, name, "peak_memory_bytes")


def _checkpoint(comparison: Comparison, name: str) -> Cell:
    return _share_of_full(comparison, name, "checkpoint_bytes")


def _planned(comparison: Comparison, name: str) -> Cell:
    return Cell(fmt.human_bytes((_arm(comparison, name).get("estimated_memory") or {}).get("total")))


def _throughput(arm: dict, unit: str) -> Cell:
    padding = _known(facts.number(arm.get("padding_share")), lambda share: f"{fmt.percent(share)} padding")
    return Cell(fmt.rate(arm.get(f"{unit}_per_second")), padding)


def _latency(comparison: Comparison, name: str) -> Cell:
    return _speed(_arm(comparison, name).get("latency_ms"), fmt.milliseconds)


def _generation(comparison: Comparison, name: str) -> Cell:
    return _speed(_arm(comparison, name).get("generation_tokens_per_second"), fmt.rate)


def _speed(figures: dict | None, show: Callable[[Any], str]) -> Cell:
    """Return the figure with the adapter, and merged; an arm without an adapter (full) has its figure under `base`."""
    figures = figures or {}
    own = figures.get("adapter") if facts.number(figures.get("adapter")) is not None else figures.get("base")
    return Cell(
        show(own), _known(facts.number(figures.get("merged")), lambda v: f"merged {show(v)}".removesuffix(" ms"))
    )
