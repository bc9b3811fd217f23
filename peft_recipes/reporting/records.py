"""The rows of a comparison's table as raw numbers, for pandas (`Comparison.to_pandas()`)."""

from __future__ import annotations

from typing import Any

from peft_recipes.reporting import answer_figures, facts, sentences
from peft_recipes.reporting.details import BASE_LABEL
from peft_recipes.reporting.facts import Comparison


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the table's raw numbers for pandas: one flat dict per row, the base first; None for no value."""
    metric = facts.metric(comparison)
    splits = {split: facts.split_metric(comparison, split) for split in facts.extra_splits(comparison)}
    answers = answer_figures.measured(comparison)
    rows = []
    if base := comparison.get("base"):
        rows.append({
            "arm": "base", "label": BASE_LABEL, "status": base.get("status", "ok"),
            metric: facts.base_value(comparison),
            **{f"{split}_{own}": facts.base_value(comparison, split) for split, own in splits.items()},
            **{key: facts.split_value(base, "test", key) for key in answers},
            "total_parameters": facts.number(base.get("total_parameters")),
        })  # fmt: skip
    for name, arm in facts.arms(comparison).items():
        difference, latency = facts.difference(comparison, name) or {}, arm.get("latency_ms") or {}
        low, high = difference.get("ci95") or (None, None)
        lowest, highest = difference.get("ci95_simultaneous") or (None, None)
        rows.append({
            "arm": name, "label": facts.label(comparison, name), "status": arm.get("status", "ok"),
            metric: facts.mean(arm),
            **{f"{split}_{own}": facts.split_value(arm, split, own) for split, own in splits.items()},
            **{key: facts.split_value(arm, "test", key) for key in answers},
            "sd": facts.spread(arm), "seeds": facts.seeds_done(arm), "against": difference.get("against"),
            "difference": difference.get("estimate"), "ci95_low": low, "ci95_high": high,
            "verdict": difference.get("verdict"), "ci95_simultaneous_low": lowest, "ci95_simultaneous_high": highest,
            "verdict_simultaneous": difference.get("verdict_simultaneous"), "method": arm.get("method"),
            "rank": arm.get("rank"),
            **{key: facts.number(arm.get(key)) for key in _FIGURES},
            "latency_ms": facts.number(latency.get("adapter")),
            "latency_merged_ms": facts.number(latency.get("merged")),
            "error": sentences.no_figures(comparison, arm) if facts.mean(arm) is None else None,
        })  # fmt: skip
    columns = list(dict.fromkeys(key for row in reversed(rows) for key in row))
    return [{key: row.get(key) for key in columns} for row in rows]


_FIGURES = (
    "trainable_parameters", "total_parameters", "checkpoint_bytes", "peak_memory_bytes", "learning_rate", "steps",
    "training_seconds", "examples_per_second", "tokens_per_second",
)  # fmt: skip
