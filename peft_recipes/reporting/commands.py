"""Commands for a reader to type: a comparison's own, with a change."""

from __future__ import annotations

import shlex

from peft_recipes.reporting import facts
from peft_recipes.reporting.facts import Comparison


def compare_command(
    comparison: Comparison, arms: str | None, setting: str | None = None, seeds: int | None = None
) -> str:
    """The comparison's own command with a change: its recipe, arms, --set and --output stay as they were asked for."""
    asked = comparison.get("asked") or {}
    arms = arms or ",".join(asked.get("arms") or [])
    output = asked.get("output")
    parts = ["peft-recipes", "compare", asked.get("recipe") or comparison.get("recipe", "RECIPE")]
    parts += ["--arms", arms] if arms else []
    parts += ["--seeds", ",".join(map(str, range(seeds)))] if seeds else []
    parts += ["--embedded"] if asked.get("embedded", comparison.get("embedded")) else []
    for change in (*(asked.get("changes") or []), *([setting] if setting else [])):
        parts += ["--set", change]
    parts += ["--output", output] if output and output != "adapters" else []
    return " ".join(shlex.quote(clean(part)) for part in parts)


def clean(text: object) -> str:
    """Text from outside on one line and without backticks, which mark commands here."""
    return " ".join(facts.plain(text).replace("`", "'").split())


def pair(comparison: Comparison, name: str) -> str:
    """The reference arm and this one, for --arms."""
    return ",".join(dict.fromkeys(filter(None, [facts.reference(comparison, name), name])))


def on_real_data(comparison: Comparison) -> str:
    """The command for the recipe's own model and data."""
    return f"peft-recipes compare {shlex.quote(clean(comparison.get('recipe', 'RECIPE')))}"
