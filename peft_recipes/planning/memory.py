"""Estimate the peak memory of an arm's training step, and whether it fits this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.arms.meta import with_arm_on_meta
from peft_recipes.distributed.batches import split_batch
from peft_recipes.errors import RecipeError
from peft_recipes.hardware import environment
from peft_recipes.hardware.device import Hardware, choose
from peft_recipes.models.meta import meta_model
from peft_recipes.models.quantisation import BYTES, quantised_weights
from peft_recipes.planning import step_memory
from peft_recipes.planning.scaling import Spread, shared_step
from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.options import LANGUAGE_TASKS
from peft_recipes.recipe.recipe import Recipe

if TYPE_CHECKING:
    from peft_recipes.data.prepared import Prepared
    from peft_recipes.distributed.launch import Launch
    from peft_recipes.tasks.base import Task

# From the second step on, glibc's heap holds freed blocks between those in use: this share of a step's activations,
# chosen on the runs of the shipped recipes (0.15 to 1.3 of activations over 40 MB).
FREED = 0.6


def spread_of(arm: Arm | None, hardware: Hardware, launch: Launch | None = None) -> Spread | None:
    """How a run of an arm is spread under a launch. On a CPU all its processes share one memory.

    Of runs at a time, together.py plans the memory.
    """
    if launch is None:
        return None
    processes = launch.processes
    return Spread(launch.distributed_type_of(arm), processes, on_one=processes if hardware.device == "cpu" else 1)


def memory(
    task: Task, prepared: Prepared | None, config: Any, name: str, spread: Spread | None = None
) -> dict[str, Any]:
    """Estimate the peak of an arm's training step in bytes, part by part, and compare it with the machine's memory.

    The step is simulated on fake tensors (step_memory.py), on the largest batch of the data; without data, on examples
    of max_length. spread: over several processes; then all figures are of one of them, with `buffers` of sharding and
    `traffic`, the bytes it sends in a step.

    libraries: what the process itself holds resident, which a run's peak on a CPU includes (0 on a GPU). freed: what
    the allocator holds there of earlier batches. fits: whether `total` is within the machine's memory.
    gradient_checkpointing: whether it was counted with; where the recipe does not set it, only if the step would not
    fit without. played: False where the step could not be simulated, and the parts are upper bounds by rule instead.
    """
    spread, arm, training = spread or Spread(), task.recipe.arms[name], task.recipe.training
    hardware, libraries = _hardware(task), 0
    if spread.memory:  # a device elsewhere
        available = spread.memory
    else:
        available = environment.device_memory_bytes(hardware.device)
        available = available and available // spread.on_one
    if not spread.memory or spread.libraries:
        libraries = step_memory.loaded_libraries_bytes() if hardware.device == "cpu" else 0
    setting = training.get("gradient_checkpointing", training.get("activation_checkpointing"))
    estimate: dict[str, Any] = {}
    for checkpointing in (False, True) if setting is None else (setting,):
        played = True
        try:
            parts = arm_step_memory(task, prepared, config, name, checkpointing, spread)
        except RecipeError:
            raise
        except Exception:  # an operation that fake tensors can't run, in some architecture
            played, parts = False, _bounded_step_memory(task, config, name, spread)
        # A linear probe's single pass frees its blocks in the order in which it took them.
        freed = int(FREED * parts["activations"]) if libraries and arm.method != "head" and played else 0
        total = parts["total"] + libraries + freed
        estimate = {
            **parts,
            "freed": freed,
            "libraries": libraries,
            "total": total,
            "machine": available,
            "fits": available is None or total < available,
            "gradient_checkpointing": checkpointing,
            "played": played,
        }
        if estimate["fits"] or arm.method == "head":
            break
    return estimate


def arm_step_memory(
    task: Task, prepared: Prepared | None, config: Any, name: str, checkpointing: bool, spread: Spread
) -> dict[str, Any]:
    """Simulate one step of an arm; return the parts of its peak in bytes, as in memory().

    Raises RecipeError where the arm can't be applied, and what torch raises for an operation that fake tensors can't
    run.
    """
    arm, training = task.recipe.arms[name], task.recipe.training
    model, _ = with_arm_on_meta(task.recipe, config, arm, name)
    if arm.method == "head":  # its peak is the pass over the frozen backbone, in evaluation's batches
        batch = task.largest_batch(model, prepared, training.get("per_device_eval_batch_size", 8))
        return step_memory.step_memory(model, batch, _loss_in_precision(task), trains=False)
    if checkpointing and getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = task.largest_batch(model, prepared, split_batch(training, spread.processes)[0])
    optim = str(arm.optim or training.get("optim"))
    parts = step_memory.step_memory(model, batch, _loss_in_precision(task), _optimizer_class(optim))
    if "8bit" in optim:  # one byte for each number of the two states, not four
        parts |= {"optimizer": parts["optimizer"] // 4, "total": parts["total"] - 3 * parts["optimizer"] // 4}
    if arm.quantise:
        parts = _with_quantised_base(parts, task, config, arm.quantise)
    return _on_one_process(parts, task, config, name, spread)


def _with_quantised_base(parts: dict[str, int], task: Task, config: Any, quantise: str) -> dict[str, int]:
    """A step's memory with quantised linear layers, each of which is dequantised to fp32 while it is computed."""
    base = meta_model(task.recipe, copy.deepcopy(config))
    count, largest = quantised_weights(base), max(p.numel() for p in base.parameters())
    saved, dequantised = int(count * (4 - BYTES[quantise])), 4 * min(largest, count)
    return {
        **parts,
        "weights": parts["weights"] - saved,
        "activations": parts["activations"] + dequantised,
        "total": parts["total"] - saved + dequantised,
    }


def _on_one_process(parts: dict[str, int], task: Task, config: Any, name: str, spread: Spread) -> dict[str, Any]:
    """A step's memory as one of several processes holds it, and its traffic."""
    if spread.kind is None:
        return parts
    model, _ = with_arm_on_meta(task.recipe, config, task.recipe.arms[name], name)
    accumulation = split_batch(task.recipe.training, spread.processes)[1]
    return shared_step(model, parts, spread, accumulation, _hardware(task).precision != "fp32")


def _bounded_step_memory(task: Task, config: Any, name: str, spread: Spread) -> dict[str, Any]:
    """Bound a step's memory by rule: 4 bytes a number, AdamW's two states, and the bound on activations."""
    _, parameters = with_arm_on_meta(task.recipe, config, task.recipe.arms[name], name)
    parts = {
        "weights": 4 * (parameters.total + parameters.adapter),
        "gradients": 4 * parameters.trainable,
        "optimizer": 8 * parameters.trainable,
        "activations": _activations_bound(task, config) or 0,
    }
    return _on_one_process({**parts, "total": sum(parts.values())}, task, config, name, spread)


def _hardware(task: Task) -> Hardware:
    return choose(task.recipe.training, task.recipe.threads)


def _loss_in_precision(task: Task) -> Callable[..., Any]:
    """The task's loss under autocast as in training: in half precision casts take memory, and their results less."""
    half = _hardware(task).precision != "fp32"

    def loss(model: Any, batch: dict[str, Any]) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            return task.step_loss(model, batch)

    return loss


def _optimizer_class(optim: str) -> Any:
    """A torch optimizer with as many states as `optim`; None (AdamW) for other families."""
    return torch.optim.SGD if "sgd" in optim else torch.optim.Adafactor if "adafactor" in optim else None


def surely_fits(task: Task, config: Any) -> bool:
    """Whether even full fine-tuning on the longest examples takes less than half of the machine, by an upper bound.

    Then the step need not be simulated. False where there is no bound.
    """
    available = environment.device_memory_bytes(_hardware(task).device)
    weights = sum(p.numel() for p in meta_model(task.recipe, copy.deepcopy(config)).parameters())
    activations = _activations_bound(task, config)
    return available is None or (activations is not None and 16 * weights + activations < available / 2)


def _activations_bound(task: Task, config: Any) -> int | None:
    """An upper bound in bytes on the activations of padded batches of max_length; None for other than transformers.

    34 numbers for each position, layer and unit of width, 5 for each pair of positions, layer and head (Korthikanti et
    al. 2022, table 2; attention that keeps no pairs takes less), and three copies of the logits.
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
    per_position = layers * (34 * width + 5 * heads * length) + 3 * vocabulary
    return 4 * batch * task.sequences_per_example * length * per_position


def too_large(name: str, memory: dict[str, Any], recipe: Recipe) -> str:
    """The message for an arm that does not fit: what it needs, and what would make it fit."""
    needed, available = (f"{memory[key] / 1e9:.1f} GB" for key in ("total", "machine"))
    batch = recipe.training.get("per_device_train_batch_size", 8)
    accumulation = recipe.training.get("gradient_accumulation_steps", 1)
    ways, step = [], memory["total"] - memory["libraries"]
    if memory["activations"] > 0.2 * step:
        if batch > 1:
            ways.append(
                f"a smaller batch (--set training.per_device_train_batch_size={batch // 2} "
                f"--set training.gradient_accumulation_steps={2 * accumulation})"
            )
        if not recipe.training.get("gradient_checkpointing"):
            ways.append("--set training.gradient_checkpointing=true")
        ways.append(f"shorter examples (--set max_length={max(recipe.max_length // 2, 2)})")
    if memory["optimizer"] + memory["gradients"] > 0.2 * step:
        ways.append("an adapter arm, whose gradients and optimizer states are small")
    ways.append("a smaller base, or one that is quantised")
    return (
        f"arm '{name}' needs about {needed} at its peak; this machine has {available}. What helps: {'; '.join(ways)}. "
        "To try all the same: --set skip_checks=[memory]."
    )
