"""Build `peft-recipes compare` commands that change one thing about a comparison."""

from __future__ import annotations

import shlex

from peft_recipes.reporting import facts
from peft_recipes.reporting.facts import Comparison


def compare_command(
    comparison: Comparison, arms: str | None, setting: str | None = None, seeds: int | None = None
) -> str:
    """Return the command of a comparison with other arms, seeds or one more --set; the rest stays as it was."""
    given = comparison.get("asked") or {}
    arms = arms or ",".join(given.get("arms") or [])
    output = given.get("output")
    if set(arms.split(",")) & set(given.get("added") or []):
        # An arm that was added while it ran is in the comparison's own recipe alone, which has the changes already.
        stored = f"{output or 'adapters'}/{comparison.get('recipe')}/recipe.yaml"
        given = {**given, "recipe": stored, "embedded": False, "changes": []}
    parts = ["peft-recipes", "compare", given.get("recipe") or comparison.get("recipe", "RECIPE")]
    parts += ["--arms", arms] if arms else []
    parts += ["--seeds", ",".join(map(str, range(seeds)))] if seeds else []
    parts += ["--embedded"] if given.get("embedded", comparison.get("embedded")) else []
    for change in (*(given.get("changes") or []), *([setting] if setting else [])):
        parts += ["--set", change]
    parts += ["--on", given["on"]] if given.get("on", "local") != "local" else []
    parts += ["--address", given["address"]] if given.get("address") else []
    parts += ["--output", output] if output and output != "adapters" else []
    return " ".join(shlex.quote(clean(part)) for part in parts)


def clean(text: object) -> str:
    """Return untrusted text on one line without backticks, which mark commands."""
    return " ".join(facts.plain(text).replace("`", "'").split())


def pair(comparison: Comparison, name: str) -> str:
    """Return the value of --arms for the reference arm and this one."""
    return ",".join(dict.fromkeys(filter(None, [facts.reference(comparison, name), name])))
