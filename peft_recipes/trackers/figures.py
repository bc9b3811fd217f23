"""What a run sends to its trackers: its configuration, its final figures, and its verdict in a comparison."""

from __future__ import annotations

import math
from typing import Any

from peft_recipes.trackers.secrets import scrubbed

RUN, COMPARISON = "run", "comparison"  # the groups that charts of these figures stand in


def configuration(recipe: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    """The resolved recipe as one run's configuration: of its arms only this one, whose options stand at the top.

    recipe: as plain data, with the key "arms".
    """
    plain = {key: value for key, value in recipe.items() if key not in ("arms", "name", "title", "description")}
    return scrubbed({"recipe": recipe["name"], "arm": arm, "seed": seed, **plain, **(recipe["arms"].get(arm) or {})})


def final_metrics(run: dict[str, Any]) -> dict[str, float]:
    """The figures of run.json as `SPLIT/METRIC` and `run/FIGURE`; what was not measured is left out."""
    training, parameters = run.get("training") or {}, run.get("parameters") or {}
    found = {
        f"{split}/{metric}": value
        for split, metrics in (run.get("metrics") or {}).items()
        for metric, value in metrics.items()
    }
    found |= {
        f"{RUN}/trainable_parameters": parameters.get("trainable"),
        f"{RUN}/total_parameters": parameters.get("total"),
        f"{RUN}/checkpoint_bytes": run.get("checkpoint_bytes"),
        f"{RUN}/peak_memory_bytes": training.get("peak_memory_bytes"),
        f"{RUN}/training_seconds": training.get("seconds"),
        f"{RUN}/total_seconds": (run.get("seconds") or {}).get("total"),
        f"{RUN}/steps": training.get("steps"),
        f"{RUN}/tokens_per_second": training.get("tokens_per_second"),
        f"{RUN}/examples_per_second": training.get("examples_per_second"),
    }
    found |= {f"{RUN}/latency_ms_{name}": value for name, value in (run.get("latency_ms") or {}).items()}
    return numbers(found)


def comparison_metrics(difference: dict[str, Any] | None) -> dict[str, float]:
    """An arm's difference from the reference arm, with its 95 % interval and the margin."""
    if not difference:
        return {}
    low, high = difference.get("ci95") or (None, None)
    return numbers(
        {
            f"{COMPARISON}/difference": difference.get("estimate"),
            f"{COMPARISON}/ci95_low": low,
            f"{COMPARISON}/ci95_high": high,
            f"{COMPARISON}/margin": difference.get("margin"),
        }
    )


def numbers(found: dict[str, Any]) -> dict[str, float]:
    """The entries that are finite numbers."""
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def last_step(run: dict[str, Any]) -> int:
    """The number of steps that a run has trained; 0 for the untrained base."""
    return (run.get("training") or {}).get("steps") or 0
