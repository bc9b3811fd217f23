"""What is known of some adapters, beside their answers: from each one's run.json and the comparison above it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.markdown import escape

if TYPE_CHECKING:
    from peft_recipes.adapters.open import Served


def evidence_markdown(opened: dict[str, Served]) -> str:
    """A table with a column an adapter and a row a figure, then each one's verdict and what the figures do not show."""
    found = {name: served.evidence() for name, served in opened.items()}
    above = {name: _comparison(served) for name, served in opened.items()}
    lines = ["| | " + " | ".join(escape(name) for name in opened) + " |", "|:--|" + "--:|" * len(opened)]
    for title, value in _ROWS.items():
        cells = [value(found[name], above[name]) if found[name] else fmt.NOTHING for name in opened]
        if any(cell != fmt.NOTHING for cell in cells):
            lines.append(f"| {title} | " + " | ".join(escape(cell) for cell in cells) + " |")
    parts = ["### Evidence", "\n".join(lines)] if len(lines) > 2 else ["### Evidence"]
    for name in opened:
        if not found[name]:
            parts.append(f"{escape(name)}: no run of peft-recipes, so nothing is known of it.")
        elif sentence := _verdict(found[name], above[name]):
            parts += [quoted] if (quoted := f"> {escape(sentence)}") not in parts else []  # seeds of one arm share it
    if any(run.get("embedded") for run in found.values()):
        parts.append("*Measured on embedded stand-ins, not on the recipe's own model and data.*")
    return "\n\n".join(parts)


def _comparison(served: Served) -> dict[str, Any]:
    """The comparison that a run is part of, which lies two folders above it; empty where there is none."""
    path = served.folder.resolve().parent.parent / "comparison.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and served.evidence().get("arm") in facts.arms(found) else {}
    except (OSError, ValueError):
        return {}


def _metric(run: dict[str, Any], _: dict[str, Any]) -> str:
    name = run.get("metric") or ""
    return fmt.quality(((run.get("metrics") or {}).get("test") or {}).get(name), name)


def _base_metric(run: dict[str, Any], above: dict[str, Any]) -> str:
    return fmt.quality(facts.base_value(above), facts.metric(above)) if above.get("base") else fmt.NOTHING


def _against_full(run: dict[str, Any], above: dict[str, Any]) -> str:
    told = sentences.describe_difference(above, run["arm"]) if above else None
    return f"{told.estimate}{told.unit} ({told.interval})" if told else fmt.NOTHING


def _latency(form: str) -> Any:
    return lambda run, _: fmt.milliseconds((run.get("latency_ms") or {}).get(form))


def _speed(form: str) -> Any:
    return lambda run, _: fmt.rate((run.get("generation_tokens_per_second") or {}).get(form))


_ROWS: dict[str, Any] = {
    "Metric": lambda run, _: f"test {fmt.metric_title(run.get('metric') or '')}",
    "Adapter": _metric,
    "Base, untuned": _base_metric,
    "Against full": _against_full,
    "Method": lambda run, _: str(run.get("method") or fmt.NOTHING),
    "Trained parameters": lambda run, _: fmt.count((run.get("parameters") or {}).get("trainable")),
    "Steps": lambda run, _: fmt.count((run.get("training") or {}).get("steps")),
    "Training time": lambda run, _: fmt.seconds((run.get("training") or {}).get("seconds")),
    "Checkpoint": lambda run, _: fmt.human_bytes(run.get("checkpoint_bytes")),
    "Latency, base": _latency("base"),
    "Latency, adapter": _latency("adapter"),
    "Latency, merged": _latency("merged"),
    "Generated tokens/s, base": _speed("base"),
    "Generated tokens/s, adapter": _speed("adapter"),
    "Generated tokens/s, merged": _speed("merged"),
}


def _verdict(run: dict[str, Any], above: dict[str, Any]) -> str:
    return sentences.verdict_headline(above, run["arm"]) if above else ""
