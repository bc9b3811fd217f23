"""The entries of run.json known whether or not the run succeeds, and those of a failed run."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from peft_recipes.distributed import processes
from peft_recipes.errors import says_out_of_memory
from peft_recipes.hardware.environment import environment
from peft_recipes.recipe.arm import rank_of
from peft_recipes.runs.folder import BASE

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.hardware.device import Hardware
    from peft_recipes.recipe.arm import Arm
    from peft_recipes.recipe.recipe import Recipe


def facts(
    recipe: Recipe,
    arm_name: str,
    seed: int,
    prepared: Prepared,
    hardware: Hardware,
    *,
    signature: str,
    attention: str | None = None,
    parameters: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts of a run: recipe, arm, data, and the environment of its figures."""
    arm = recipe.arms.get(arm_name)
    return {
        "schema": 1,
        "status": "ok",
        "error": None,
        "signature": signature,
        "recipe": recipe.name,
        "arm": arm_name,
        "method": arm.method_name if arm else BASE,
        "rank": rank_of(arm) if arm else None,
        "quantise": arm.quantise if arm else None,
        "target_modules": _target_modules(arm),
        "seed": seed,
        "embedded": recipe.uses_stand_ins,
        "task": recipe.task,
        "model": recipe.model,
        "dataset": recipe.data_name,
        "metric": recipe.metric,
        "learning_rate": arm.learning_rate if arm else None,
        "parameters": parameters,
        "rows": prepared.rows,
        "labels": prepared.labels,
        "samples": prepared.samples,
        "notes": [*prepared.notes, *_notes(hardware)],
        "environment": {
            **environment(hardware),
            **processes.facts(),
            "attention": attention,
            "dataset_fingerprint": prepared.fingerprint,
        },
    }


def failure(error: BaseException) -> dict[str, Any]:
    """The status, error and traceback of a failed run; of several ranks, the error of the first that failed."""
    own = {"process": 0, "type": type(error).__name__, "error": processes.error_message(error)}
    first = processes.first_failure() or own
    where = f" (in process {first['process']} of {processes.count()})" if processes.count() > 1 else ""
    out_of_memory = isinstance(error, MemoryError) or first["type"] == "MemoryError"
    out_of_memory = out_of_memory or says_out_of_memory(first["error"])
    sharing = processes.facts()["device_jobs" if "CUDA" in first["error"] else "jobs"]
    hint = f" (up to {sharing} runs at a time shared the memory; with --jobs 1 each has all of it)"
    return {
        "status": "out-of-memory" if out_of_memory else "failed",
        "error": f"{first['type']}: {first['error']}{where}{hint if out_of_memory and sharing > 1 else ''}",
        "traceback": traceback.format_exc(),
    }


def _notes(hardware: Hardware) -> list[str]:
    ranks, notes = processes.facts(), []
    if ranks["processes"] > 1:
        where = f" on {ranks['machines']} machines" if ranks["machines"] > 1 else ""
        notes.append(f"Trained by {ranks['processes']} processes{where} ({ranks['distributed']}).")
        if hardware.device == "cpu":
            notes.append(
                "The processes share this machine's cores: their timings say nothing of processes with a device of "
                "their own."
            )
    if ranks["jobs"] > 1:
        shared = "its processor and its memory" if hardware.device == "cpu" else "a GPU each, but one processor"
        if hardware.device == "mps" or ranks["device_jobs"] > 1:
            number = max(ranks["device_jobs"], ranks["jobs"] if hardware.device == "mps" else 1)
            shared = f"up to {number} a GPU, each with memory of its own"
        notes.append(
            f"Up to {ranks['jobs']} runs at a time shared this machine ({shared}): timings are of that. "
            "`--measure` takes them again, one run at a time."
        )
    return notes


def _target_modules(arm: Arm | None) -> list[str] | None:
    names = getattr(arm.peft, "target_modules", None) if arm else None
    return [names] if isinstance(names, str) else sorted(names) if names else None
