"""A comparison on a device with little memory left: LoRA fits, the other arm does not."""

from __future__ import annotations

import contextlib
import copy
import resource
from collections.abc import Iterator
from typing import Any

from gpu import workspace

_CONTEXT = 1.5e9  # bytes of a second process on the GPU, outside the allocator
_HUGE_RANK = 40_000_000  # its first matrix takes 10 GB with the tiny model's width
_CPU_LIMIT = 6 * 10**9  # bytes of data of each process


def compare_with_scarce_memory(result: Any, shape: str) -> dict[str, Any]:
    """Compare two arms of which one can't fit; return each arm's status, error and peak."""
    from peft_recipes import compare, load_recipe
    from peft_recipes.comparison import pool

    file = workspace.recipe_file(result.work, shape, "alpaca", 32, result.device, result.tiny)
    changes = ["training.max_steps=4", "training.per_device_train_batch_size=8", "training.eval_strategy=no"]
    recipe = load_recipe(file, changes=changes)
    recipe.name, recipe.skip_checks = "scarce-memory", ["memory"]
    if result.device == "cpu":
        pool.FORK_RUNS = True  # nothing reads their peak memory here, and each starts seconds earlier
        recipe.arms = {"huge": copy.deepcopy(recipe.arms["lora"]), "lora": recipe.arms["lora"]}
        recipe.arms["huge"].method.r = _HUGE_RANK
    else:
        recipe.arms = {name: recipe.arms[name] for name in ("full", "lora")}
    with _limited() if result.device == "cpu" else _held(recipe):
        arms = compare(recipe, output=result.work / "scarce", overwrite=True).data["arms"]
    errors = {name: result.without_paths(str(arm["error"]))[:500] for name, arm in arms.items() if arm["error"]}
    return {"arms": {name: arm["status"] for name, arm in arms.items()}, "errors": errors,
            "peak_memory_bytes": {name: arm.get("peak_memory_bytes") for name, arm in arms.items()}}  # fmt: skip


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Limit the memory of this process's workers, which inherit its limits."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_CPU_LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextlib.contextmanager
def _held(recipe: Any) -> Iterator[None]:
    """Hold the GPU's memory but for what is half-way between the two arms' plans."""
    import torch

    from peft_recipes.planning.plan import plan

    planned = plan(recipe)["arms"]
    left = sum(planned[name]["memory"]["total"] for name in ("full", "lora")) / 2 + _CONTEXT
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(int(free - left), 1), dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()
