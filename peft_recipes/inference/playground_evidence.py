"""The playground's evidence: each adapter's measured figures, from its run.json and the comparison it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_recipes.adapters.open import OpenedAdapter
from peft_recipes.errors import RecipeError
from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.markdown import escape
from peft_recipes.runs.folder import read_comparison_file

Figure = Callable[[dict[str, Any], dict[str, Any]], str]  # of a run.json and a comparison.json (may be empty)


def evidence_markdown(adapters: dict[str, OpenedAdapter]) -> str:
    """Return a table with a column per adapter and a row per figure, then each adapter's verdict."""
    runs = {name: adapter.saved.run for name, adapter in adapters.items()}
    comparisons = {name: _comparison(adapter) for name, adapter in adapters.items()}
    lines = ["| | " + " | ".join(escape(name) for name in adapters) + " |", "|:--|" + "--:|" * len(adapters)]
    for title, figure in _FIGURES.items():
        cells = [figure(runs[name], comparisons[name]) if runs[name] else fmt.NOTHING for name in adapters]
        if any(cell != fmt.NOTHING for cell in cells):
            lines.append(f"| {title} | " + " | ".join(escape(cell) for cell in cells) + " |")
    parts = ["### Evidence", "\n".join(lines)] if len(lines) > 2 else ["### Evidence"]
    for name in adapters:
        if not runs[name]:
            parts.append(f"{escape(name)}: no run of peft-recipes, so nothing is known of it.")
        elif comparisons[name] and (verdict := sentences.verdict_headline(comparisons[name], runs[name]["arm"])):
            quoted = f"> {escape(verdict)}"
            parts += [quoted] if quoted not in parts else []  # seeds of one arm share a verdict
    if any(run.get("embedded") for run in runs.values()):
        parts.append("*Measured on embedded stand-ins, not on the recipe's own model and data.*")
    return "\n\n".join(parts)


def _comparison(adapter: OpenedAdapter) -> dict[str, Any]:
    """Read the comparison.json two folders above a run; empty without a finished one of the run's arm."""
    try:
        data = read_comparison_file(adapter.folder.resolve().parent.parent)
    except RecipeError:
        return {}
    return data if adapter.saved.run.get("arm") in facts.arms(data) and not data.get("provisional") else {}


def _test_metric(run: dict[str, Any], _: dict[str, Any]) -> str:
    name = run.get("metric") or ""
    return fmt.quality(((run.get("metrics") or {}).get("test") or {}).get(name), name)


def _base_metric(_: dict[str, Any], comparison: dict[str, Any]) -> str:
    if not comparison.get("base"):
        return fmt.NOTHING
    return fmt.quality(facts.base_value(comparison), facts.metric(comparison))


def _difference(run: dict[str, Any], comparison: dict[str, Any]) -> str:
    difference = sentences.describe_difference(comparison, run["arm"]) if comparison else None
    return f"{difference.estimate}{difference.unit} ({difference.interval})" if difference else fmt.NOTHING


def _figure(form: Callable[[Any], str], *keys: str) -> Figure:
    """A figure of run.json at this path of keys, formatted by `form`, which takes None for a missing one."""

    def figure(run: dict[str, Any], _: dict[str, Any]) -> str:
        value: Any = run
        for key in keys:
            value = (value or {}).get(key)
        return form(value)

    return figure


_FORMS = ("base", "adapter", "merged")
_FIGURES: dict[str, Figure] = {
    "Metric": lambda run, _: f"test {fmt.metric_title(run.get('metric') or '')}",
    "Adapter": _test_metric,
    "Base, untuned": _base_metric,
    "Against full": _difference,
    "Method": lambda run, _: str(run.get("method") or fmt.NOTHING),
    "Trained parameters": _figure(fmt.count, "parameters", "trainable"),
    "Steps": _figure(fmt.count, "training", "steps"),
    "Training time": _figure(fmt.seconds, "training", "seconds"),
    "Checkpoint": _figure(fmt.human_bytes, "checkpoint_bytes"),
    **{f"Latency, {form}": _figure(fmt.milliseconds, "latency_ms", form) for form in _FORMS},
    **{f"Generated tokens/s, {form}": _figure(fmt.rate, "generation_tokens_per_second", form) for form in _FORMS},
}
