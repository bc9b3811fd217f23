"""The arms and the batch of a draft: what fits this machine's memory, with the usual learning rates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft_recipes.arms.selection import Base
from peft_recipes.errors import RecipeError
from peft_recipes.models.architecture_table import ARCHITECTURES
from peft_recipes.models.architectures import architecture_of, targets
from peft_recipes.planning import memory as planned
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.options import HEAD_TASKS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.tasks.registry import task_of

RANKS = (16, 64)
# Learning rates of full, head and lora: those of the shipped recipes, LoRA's about ten times full's.
RATES = {
    "text-classification": (5e-5, 1e-3, 5e-4),
    "token-classification": (5e-5, 1e-3, 5e-4),
    "image-classification": (5e-5, 1e-3, 5e-4),
    "sft": (2e-5, None, 2e-4),
    "language-modeling": (5e-5, None, 5e-4),
    "seq2seq": (1e-4, None, 1e-3),
    "dpo": (1e-6, None, 1e-5),
    "kto": (1e-6, None, 1e-5),
    "grpo": (1e-6, None, 1e-5),
    "reward": (1e-5, 1e-3, 1e-4),
}
_CONVOLUTIONAL = (3e-3, 3e-3, 3e-3)  # as vision-shift's, whose base is convolutional
# Examples in a batch where memory is no concern.
BATCHES = {"image-classification": 32, "text-classification": 16, "token-classification": 16}
_BATCH = 8


@dataclass
class Fitted:
    """The recipe with its arms and batch, and why, by the name of what was chosen.

    layers: the targets of LoRA. targets: the Python expression for them.
    """

    recipe: Recipe
    layers: list[str] | str
    targets: str
    why: dict[str, str] = field(default_factory=dict)


def fitted(recipe: Recipe, base_options: dict[str, Any], batch: int | None, ranks: list[int], rows: int) -> Fitted:
    """Add arms and batch to a recipe. Its memory is estimated on examples of max_length, without the data.

    base_options: of the base's head. batch, ranks: as asked, or None and empty. rows: training examples.
    Raises RecipeError if not even LoRA on a quantised base fits.
    """
    from peft_recipes.models import bases

    config = bases.load_config(recipe, **base_options)
    base = Base(recipe)
    base.config = config
    group, text = _targets(config)
    full, head, lora = _CONVOLUTIONAL if group == "convolutions" else RATES[recipe.task]
    made = {f"lora{'' if not number else f'-r{rank}'}": Arm(_lora(rank, config, group), learning_rate=lora)
            for number, rank in enumerate(ranks or _ranks(base, group))}  # fmt: skip
    arms = {"full": Arm(learning_rate=full)}
    if recipe.task in HEAD_TASKS and head is not None:
        arms["head"] = Arm("head", learning_rate=head)
    recipe = dataclasses.replace(recipe, arms={**arms, **made})
    result = _with_batch(Fitted(recipe, targets(config, group), text), config, batch, rows)
    result.why["rates"] = (
        "LoRA's about ten times full's" if group != "convolutions" else "as of the recipe vision-shift"
    )
    rank = next(iter(made.values())).peft.r
    result.why["lora"] = _why_rank(rank, bool(ranks), recipe.task)
    return result


def _why_rank(rank: int, asked: bool, task: str) -> str:
    if asked:
        return "as asked"
    if rank != RANKS[0]:
        return "half of the narrowest layer, for a base this small" if rank < RANKS[0] else f"r={rank}"
    return "r=16 on all linear layers is where LoRA usually matches full"


def _ranks(base: Base, group: str) -> list[int]:
    """Ranks of at most half the narrowest layer, or one that is a power of two."""
    if group == "convolutions":
        return [8]
    half = min(min(shape) for shape in base.shapes()) // 2
    return [rank for rank in RANKS if rank <= half] or [1 << max(half.bit_length() - 1, 0)]


def _targets(config: Any) -> tuple[str, str]:
    """The group of layers to adapt, and the expression for it in the recipe."""
    row = architecture_of(config)
    group = "convolutions" if row.group("convolutions") and not row.group("all-linear") else "all-linear"
    if config.model_type in ARCHITECTURES:
        return group, f'targets("{config.model_type}", "{group}")'
    return group, repr(row.group(group)).replace("'", '"')


def _lora(rank: int, config: Any, group: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets(config, group))


def _with_batch(result: Fitted, config: Any, batch: int | None, rows: int) -> Fitted:
    """Choose the largest batch with which full fits, else LoRA; leave out the arms that fit with none."""
    recipe = result.recipe
    wanted = batch or _wanted(recipe.task, rows)
    sizes = [batch] if batch else [size for size in (32, 16, 8, 4, 2, 1) if size <= wanted and not
                                   (size == 1 and recipe.task in ("kto", "grpo"))]  # fmt: skip
    for names in (list(recipe.arms), [name for name in recipe.arms if name != "full"]):
        tried = names[0] if names[0] == "full" else next(name for name in names if name.startswith("lora"))
        for size in sizes:
            sized = _sized(recipe, size, wanted)
            estimate = _estimate(sized, config, tried)
            if estimate["fits"]:
                return _keep(result, sized, names, config, wanted, size, estimate)
        result.why["full"] = _too_large(estimate)
    return _quantised(result, config, sizes, wanted)


def _quantised(result: Fitted, config: Any, sizes: list[int], wanted: int) -> Fitted:
    """LoRA on a base in 4 bits, for a base that does not fit otherwise."""
    lora = result.recipe.arms["lora"]
    sized = _sized(result.recipe, sizes[-1], wanted)
    sized = dataclasses.replace(sized, arms={"qlora": dataclasses.replace(lora, quantise="nf4")})
    estimate = _estimate(sized, config, "qlora")
    if not estimate["fits"]:
        raise RecipeError(
            f"model '{sized.model}' does not fit: even LoRA on a base in 4 bits with {sizes[-1]} example of "
            f"{sized.max_length} tokens needs {_gigabytes(estimate['total'])}, and this machine has "
            f"{_gigabytes(estimate['machine'])}. Name a smaller --model, or a smaller --max-length."
        )
    result.why["qlora"] = "LoRA fits only on a base in 4 bits"
    return _keep(result, sized, ["qlora"], config, wanted, sizes[-1], estimate)


def _wanted(task: str, rows: int) -> int:
    """The usual batch, halved while an epoch would have less than ten steps."""
    size = BATCHES.get(task, _BATCH)
    while size > 4 and rows // size < 10:
        size //= 2
    return size


def _sized(recipe: Recipe, size: int, wanted: int) -> Recipe:
    changes: dict[str, Any] = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
    if size < wanted:
        changes["gradient_accumulation_steps"] = wanted // size
    return dataclasses.replace(recipe, training={**recipe.training, **changes})


def _estimate(recipe: Recipe, config: Any, name: str) -> dict[str, Any]:
    """The memory of an arm on examples of max_length; not simulated where a bound shows that it fits."""
    task = task_of(recipe)
    if recipe.arms[name].quantise is None and planned.surely_fits(task, config):
        return {"fits": True, "total": None, "machine": None}
    return planned.memory(task, None, config, name)


def _keep(
    result: Fitted, recipe: Recipe, names: list[str], config: Any, wanted: int, size: int, estimate: dict[str, Any]
) -> Fitted:
    """Leave out the arms that don't fit with this batch."""
    kept = {name: arm for name, arm in recipe.arms.items() if name in names}
    if estimate["total"] is not None:  # near the limit: each arm is tried
        kept = {name: arm for name, arm in kept.items() if _estimate(recipe, config, name)["fits"]}
        result.why["batch"] = f"{_gigabytes(estimate['total'])} of this machine's {_gigabytes(estimate['machine'])}"
    else:
        few = size == wanted < BATCHES.get(recipe.task, _BATCH)
        result.why["batch"] = "fewer than usual, as the rows are few" if few else "memory is no concern here"
    if size < wanted:
        result.why["accumulation"] = f"a step of {wanted} examples, as memory has room for {size} at a time"
    result.recipe = dataclasses.replace(recipe, arms=kept)
    return result


def _too_large(estimate: dict[str, Any]) -> str:
    return (
        f"no arm full: it needs about {_gigabytes(estimate['total'])} with one example, and this machine has "
        f"{_gigabytes(estimate['machine'])}"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
