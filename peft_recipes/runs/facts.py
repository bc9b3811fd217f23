"""What run.json says of a run whatever becomes of it, and of one that failed."""

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
    """The facts of a run: recipe, arm, data, and the environment that its figures come from."""
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
        "dataset": recipe.dataset.path,
        "metric": recipe.metric,
        "learning_rate": arm.learning_rate if arm else None,
        "parameters": parameters,
        "rows": prepared.rows,
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
    """What run.json says of a failed run beside its facts. Of several processes, what the first that failed said."""
    told = processes.failure() or {"process": 0, "type": type(error).__name__, "error": processes.said(error)}
    where = f" (in process {told['process']} of {processes.count()})" if processes.count() > 1 else ""
    return {
        "status": "out-of-memory" if out_of_memory(error, told) else "failed",
        "error": f"{told['type']}: {told['error']}{where}",
        "traceback": traceback.format_exc(),
    }


def out_of_memory(error: BaseException, told: dict[str, Any] | None = None) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in the CPU's allocator."""
    short = isinstance(error, MemoryError) or (told or {}).get("type") == "MemoryError"
    return short or says_out_of_memory(str(told["error"] if told else error))


def _notes(hardware: Hardware) -> list[str]:
    found, said = processes.facts(), []
    if found["processes"] > 1:
        where = f" on {found['machines']} machines" if found["machines"] > 1 else ""
        said.append(f"Trained by {found['processes']} processes{where} ({found['distributed']}).")
        if hardware.device == "cpu":
            said.append("The processes share this machine's cores: their timings say nothing of processes with a "
                        "device of their own.")  # fmt: skip
    if found["jobs"] > 1:
        shared = "its processor and its memory" if hardware.device == "cpu" else "a GPU each, but one processor"
        said.append(f"Up to {found['jobs']} runs at a time shared this machine ({shared}): timings are of that.")
    return said


def _target_modules(arm: Arm | None) -> list[str] | None:
    names = getattr(arm.peft, "target_modules", None) if arm else None
    return [names] if isinstance(names, str) else sorted(names) if names else None
