"""A recipe's batch, written as for one process, shared out: the examples of an optimiser step stay the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    from peft_recipes.recipe.recipe import Recipe

_BATCH, _ACCUMULATED = "per_device_train_batch_size", "gradient_accumulation_steps"


def whole_batch(training: dict[str, Any]) -> int:
    """Examples of an optimiser step, whatever the number of processes."""
    return training.get(_BATCH, 8) * training.get(_ACCUMULATED, 1)


def shared_out(training: dict[str, Any], processes: int) -> tuple[int, int]:
    """per_device_train_batch_size and gradient_accumulation_steps of each of so many processes.

    As large a batch as the recipe's own allows, so that as few as possible are accumulated. Raises RecipeError where
    the examples of a step do not divide, with the nearest numbers that do.
    """
    whole = whole_batch(training)
    if whole % processes:
        raise RecipeError(_indivisible(training, whole, processes))
    each = whole // processes
    batch = next(size for size in range(min(training.get(_BATCH, 8), each), 0, -1) if each % size == 0)
    return batch, each // batch


def check_spreadable(recipe: Recipe, arm: str, kind: str | None) -> None:
    """Raises RecipeError for what does not go with weights that are spread over processes (FSDP2)."""
    chosen, where = recipe.arms.get(arm), "not with FSDP2, whose weights are spread over the processes. Launch with ddp"
    if kind != "FSDP2":
        return
    if recipe.training.get("load_best_model_at_end"):
        raise RecipeError(f"training.load_best_model_at_end: {where}, or leave it out.")
    if chosen is not None and (chosen.quantise or chosen.method_name == "ADALORA"):
        what = f"a base in {chosen.quantise}" if chosen.quantise else "AdaLoRA, which looks at whole weights,"
        raise RecipeError(f"arm '{arm}': {what} is {where}.")


def _indivisible(training: dict[str, Any], whole: int, processes: int) -> str:
    near = [n for n in (whole // processes * processes, -(-whole // processes) * processes) if n]
    near.sort(key=lambda n: abs(n - whole))
    divisors = sorted((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - processes))
    sizes = " or ".join(f"--set training.{_BATCH}={n} --set training.{_ACCUMULATED}=1" for n in near[:1])
    return (
        f"training: {training.get(_BATCH, 8)} examples a batch times {training.get(_ACCUMULATED, 1)} accumulated are "
        f"{whole} a step, which {processes} processes can't share evenly. The nearest that they can: {near[0]} "
        f"({sizes}); or {divisors[0]} process{'es' * (divisors[0] > 1)}."
    )
