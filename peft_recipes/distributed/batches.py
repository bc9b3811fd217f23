"""The batch of an optimiser step, which a recipe writes as for one process, split over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_recipes.errors import RecipeError

if TYPE_CHECKING:
    from peft_recipes.recipe.recipe import Recipe

_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


def effective_batch_size(training: dict[str, Any]) -> int:
    """Examples per optimiser step, over all ranks."""
    return training.get(_BATCH, 8) * training.get(_ACCUMULATION, 1)


def split_batch(training: dict[str, Any], processes: int) -> tuple[int, int]:
    """per_device_train_batch_size and gradient_accumulation_steps of each rank, for the same effective batch size.

    The batch is as large as the recipe's allows, to accumulate as little as possible. Raises RecipeError where the
    effective batch size is not divisible, with the nearest numbers that are.
    """
    total = effective_batch_size(training)
    if total % processes:
        multiples = (total // processes * processes, -(-total // processes) * processes)
        nearest = min((n for n in multiples if n), key=lambda n: abs(n - total))
        divisor = min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - processes))
        raise RecipeError(
            f"training: {training.get(_BATCH, 8)} examples a batch times {training.get(_ACCUMULATION, 1)} accumulated "
            f"are {total} a step, which {processes} processes can't share evenly. The nearest that they can: {nearest} "
            f"(--set training.{_BATCH}={nearest} --set training.{_ACCUMULATION}=1); or {divisor} "
            f"process{'es' * (divisor > 1)}."
        )
    per_rank = total // processes
    batch = next(size for size in range(min(training.get(_BATCH, 8), per_rank), 0, -1) if per_rank % size == 0)
    return batch, per_rank // batch


def check_shardable(recipe: Recipe, arm: str, distributed_type: str | None) -> None:
    """Raise RecipeError for an arm or an option that does not work with weights sharded by FSDP2."""
    chosen, where = recipe.arms.get(arm), "not with FSDP2, which shards the weights over ranks. Launch with ddp"
    if distributed_type != "FSDP2":
        return
    if recipe.training.get("load_best_model_at_end"):
        raise RecipeError(f"training.load_best_model_at_end: {where}, or leave it out.")
    if chosen is not None and chosen.method != "head" and recipe.task == "image-classification":
        raise RecipeError(f"arm '{arm}': Accelerate can't shard the patch embedding of an image model, so {where}.")
    if chosen is not None and recipe.task == "seq2seq":
        raise RecipeError(f"arm '{arm}': Accelerate can't shard what encoder and decoder share, so {where}.")
    if chosen is not None and (chosen.quantise or chosen.method_name == "ADALORA"):
        what = f"a base in {chosen.quantise}" if chosen.quantise else "AdaLoRA, which needs complete weights,"
        raise RecipeError(f"arm '{arm}': {what} is {where}.")
