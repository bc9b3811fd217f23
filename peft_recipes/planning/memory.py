"""What an arm's training step takes of a machine's memory, with its base quantised or its state shared, and whether it
fits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft_recipes.distributed.batches import split_batch
from peft_recipes.errors import RecipeError
from peft_recipes.models.meta import meta_model
from peft_recipes.planning.scaling import Spread
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.options import LANGUAGE_TASKS
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.distributed.launch import Launch
    from peft_recipes.hardware.device import Hardware
    from peft_recipes.tasks.base import Task

# glibc's heap, from the second step on, holds freed blocks between those in use: this share of a step's activations,
# chosen on our recipes' runs (0.15 to 1.3 of them where these are over 40 MB).
FREED = 0.6


def spread_of(arm: Arm | None, hardware: Hardware, launch: Launch | None = None, jobs: int = 1) -> Spread | None:
    """How a run of an arm is shared here: under a launch, or beside other jobs. On a CPU all share one memory."""
    if launch is None:
        return Spread(on_one=jobs) if jobs > 1 and hardware.device == "cpu" else None
    kind, processes = launch.distributed_type_of(arm), launch.processes
    return Spread(kind, processes, on_one=processes if hardware.device == "cpu" else 1)


def memory(
    task: Task, prepared: Prepared | None, config: Any, arm: Arm, name: str, spread: Spread | None = None
) -> dict[str, Any]:
    """The peak of an arm's training step in bytes, part by part, and what the machine has.

    spread: over several processes; then all is of one of them, `buffers` what sharing takes, `traffic` the bytes that
    it sends in a step.

    The step is played on tensors without data (step_memory.py), on the largest batch that the data makes; where it
    can't be had, on examples of max_length. libraries: what the process itself holds resident, which a run's peak on
    a CPU holds as well (0 on a GPU); freed: what the allocator holds there of batches before. fits: whether `total` is
    within the machine's memory. gradient_checkpointing: whether it was counted with; where the recipe does not say, it
    is only where the step would not fit without. played: False where the step holds an operation that can't be played,
    and the parts are bounds by rule instead.
    """
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import device_memory_bytes
    from peft_recipes.planning.step_memory import loaded_libraries_bytes

    hardware = choose(task.recipe.training, task.recipe.threads)
    libraries = loaded_libraries_bytes() if hardware.device == "cpu" else 0
    spread = spread or Spread()
    has = spread.memory or device_memory_bytes(hardware.device)
    has = has and has // (1 if spread.memory else spread.on_one)
    libraries = 0 if spread.memory else libraries  # of a GPU elsewhere
    training = task.recipe.training
    asked = training.get("gradient_checkpointing", training.get("activation_checkpointing"))
    found: dict[str, Any] = {}
    for checkpointing in (False, True) if asked is None else (asked,):
        played = True
        try:
            parts = arm_step_memory(task, prepared, config, arm, name, checkpointing, spread)
        except RecipeError:
            raise
        except Exception:  # an operation that can't be played without data, in some architecture
            played, parts = False, _rough(task, prepared, config, arm, name, spread)
        learns = arm.method != "head"  # whose one pass frees what it took in the order in which it took it
        freed = int(FREED * parts["activations"]) if libraries and learns and played else 0
        total = parts["total"] + libraries + freed
        fits = has is None or total < has
        found = {**parts, "freed": freed, "libraries": libraries, "total": total, "machine": has, "fits": fits,
                 "gradient_checkpointing": checkpointing, "played": played}  # fmt: skip
        if fits or arm.method == "head":
            break
    return found


def arm_step_memory(
    task: Task, prepared: Prepared | None, config: Any, arm: Arm, name: str, checkpointing: bool, spread: Spread
) -> dict[str, Any]:
    """The parts of one step's peak in bytes, as memory() gives them, with or without gradient checkpointing.

    Raises RecipeError as the arm's making does, and what torch raises for an operation that can't be played.
    """
    from peft_recipes.arms.meta import with_arm_on_meta
    from peft_recipes.planning.step_memory import step_memory

    training = task.recipe.training
    model, _ = with_arm_on_meta(task.recipe, config, arm, name)
    if arm.method == "head":  # the pass over the frozen backbone, in evaluation's batches, is its peak
        batch = task.largest_batch(model, prepared, training.get("per_device_eval_batch_size", 8))
        return step_memory(model, batch, _in_precision(task), learns=False)
    if checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    size, accumulated = split_batch(training, spread.processes)
    batch = task.largest_batch(model, prepared, size)
    optim = str(arm.optim or training.get("optim"))
    parts = step_memory(model, batch, _in_precision(task), _optimizer(optim))
    if "8bit" in optim:  # its two states are a byte a number each, not four
        parts |= {"optimizer": parts["optimizer"] // 4, "total": parts["total"] - 3 * parts["optimizer"] // 4}
    if arm.quantise:
        parts = _with_quantised_base(parts, task, config, arm)
    return _shared(parts, task, config, arm, name, spread, accumulated)


def _with_quantised_base(parts: dict[str, int], task: Task, config: Any, arm: Arm) -> dict[str, int]:
    """A step's memory where the linear layers are stored in fewer bits, and each is fp32 while it is computed."""
    from peft_recipes.models.quantisation import BYTES, quantised_weights

    base = meta_model(task.recipe, copy.deepcopy(config))
    count, largest = quantised_weights(base), max(p.numel() for p in base.parameters())
    saved = int(count * (4 - BYTES[arm.quantise]))
    used = {"weights": parts["weights"] - saved, "activations": parts["activations"] + 4 * min(largest, count)}
    return {**parts, **used, "total": parts["total"] - saved + 4 * min(largest, count)}


def _shared(
    parts: dict[str, int], task: Task, config: Any, arm: Arm, name: str, spread: Spread, accumulated: int
) -> dict[str, Any]:
    """The parts of a step as one of several processes holds them, and what it sends."""
    from peft_recipes.arms.meta import with_arm_on_meta
    from peft_recipes.hardware.device import choose
    from peft_recipes.planning.scaling import shared_step

    if spread.kind is None:
        return parts
    model, _ = with_arm_on_meta(task.recipe, config, arm, name)
    lower = choose(task.recipe.training, task.recipe.threads).precision == "bf16"
    found = shared_step(model, parts, spread, accumulated, lower)
    return {key: value for key, value in found.items() if key != "sizes"}


def _in_precision(task: Task) -> Callable[..., Any]:
    """The loss computed as training computes it: where that is bf16, its casts take memory and its results less."""
    import torch

    from peft_recipes.hardware.device import choose

    lower = choose(task.recipe.training, task.recipe.threads).precision == "bf16"

    def loss(model: Any, batch: dict[str, Any]) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
            return task.step_loss(model, batch)

    return loss


def _optimizer(name: Any) -> Any:
    """A torch optimizer with as many states as the one of that name; None (AdamW) where it is of another family."""
    import torch

    return torch.optim.SGD if "sgd" in str(name) else torch.optim.Adafactor if "adafactor" in str(name) else None


def surely_fits(task: Task, config: Any) -> bool:
    """Whether even a full fine-tune of the longest examples needs less than half of the machine, by a rough bound.

    Then there is no need to play the step. False where the bound can't be told.
    """
    from peft_recipes.hardware.device import choose
    from peft_recipes.hardware.environment import device_memory_bytes

    has = device_memory_bytes(choose(task.recipe.training).device)
    weights = sum(p.numel() for p in meta_model(task.recipe, copy.deepcopy(config)).parameters())
    activations = _activations_bound(task, config)
    return has is None or (activations is not None and 16 * weights + activations < has / 2)


def _activations_bound(task: Task, config: Any) -> int | None:
    """Bytes of activations that padded batches of max_length stay below; None for a model without layers of a width.

    34 numbers a position, layer and unit of width, 5 a pair of positions, layer and head (Korthikanti et al. 2022,
    table 2; attention that keeps no pairs takes less), and three copies of the logits.
    """
    training, text = task.recipe.training, config.get_text_config()
    layers, width, heads = (
        getattr(text, k, 0) or 0 for k in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not (isinstance(width, int) and layers * width):
        return None
    batch = max(training.get("per_device_train_batch_size", 8), training.get("per_device_eval_batch_size", 8))
    length = task.recipe.max_length
    vocabulary = text.vocab_size if task.recipe.task in LANGUAGE_TASKS else 0
    return 4 * batch * task.sequences * length * (layers * (34 * width + 5 * heads * length) + 3 * vocabulary)


def _rough(task: Task, prepared: Prepared | None, config: Any, arm: Arm, name: str, spread: Spread) -> dict[str, Any]:
    """The parts of a step's memory by rule: 4 bytes a number, AdamW's two states, and the bound on activations."""
    from peft_recipes.arms.meta import with_arm_on_meta

    _, parameters = with_arm_on_meta(task.recipe, config, arm, name)
    trains = 4 * parameters.trainable
    parts = {"weights": 4 * (parameters.total + parameters.adapter), "gradients": trains, "optimizer": 2 * trains,
             "activations": _activations_bound(task, config) or 0}  # fmt: skip
    parts["total"] = sum(parts.values())
    accumulated = split_batch(task.recipe.training, spread.processes)[1]
    return _shared(parts, task, config, arm, name, spread, accumulated)


def too_large(name: str, memory: dict[str, Any], recipe: Recipe) -> str:
    """What an arm that does not fit needs, and what would make it fit."""
    needs, has = (f"{memory[key] / 1e9:.1f} GB" for key in ("total", "machine"))
    batch = recipe.training.get("per_device_train_batch_size", 8)
    ways, step = [], memory["total"] - memory["libraries"]
    if memory["activations"] > 0.2 * step:
        if batch > 1:
            ways.append(f"a smaller batch (--set training.per_device_train_batch_size={max(batch // 2, 1)} "
                        f"--set training.gradient_accumulation_steps="
                        f"{2 * recipe.training.get('gradient_accumulation_steps', 1)})")  # fmt: skip
        if not recipe.training.get("gradient_checkpointing"):
            ways.append("--set training.gradient_checkpointing=true")
        ways.append(f"shorter examples (--set max_length={max(recipe.max_length // 2, 2)})")
    if memory["optimizer"] + memory["gradients"] > 0.2 * step:
        ways.append("an adapter arm, whose gradients and optimizer states are small")
    ways.append("a smaller base, or one that is quantised")
    return (
        f"arm '{name}' needs about {needs} at its peak; this machine has {has}. What helps: {'; '.join(ways)}. "
        "To try all the same: --set skip_checks=[memory]."
    )
