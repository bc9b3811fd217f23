"""Checks after saving: the checkpoint, reloaded on a fresh base, gives the same logits; latency of each variant."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.arms.merge import merged
from peft_recipes.guards import checks
from peft_recipes.measuring.latency import median_milliseconds
from peft_recipes.models.quantisation import TOLERANCE, dequantised
from peft_recipes.recipe.arm import Arm
from peft_recipes.runs.outputs import store_outputs
from peft_recipes.training.save import restore

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.data.prepared import Prepared
    from peft_recipes.guards.runner import Guards
    from peft_recipes.hardware.device import Hardware
    from peft_recipes.tasks.base import Task


_TIMED_INPUTS = 20


_COMPARED_INPUTS = 2  # of trained, reloaded and merged; stored for `check`, wherever the adapter goes


_COMPARED_TOKENS = 64  # of each: enough to tell models apart, and little enough for the guard to stay cheap


def verify(
    task: Task, prepared: Prepared, arm: Arm, trained: nn.Module, folder: Path, hardware: Hardware, guard: Guards
) -> dict[str, Any]:
    """Loads what was saved onto a fresh base and holds its outputs against the trained model's; times each form.

    Returns latency_ms and generation_tokens_per_second, each of base, adapter and merged, None where a form does not
    exist. guard: keeps the largest differences, as shares of the outputs' size. Raises RuntimeError where saved and
    trained differ.
    """
    inputs = task.inputs(prepared, _TIMED_INPUTS)
    compared = [
        {name: tensor[:, :_COMPARED_TOKENS] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}
        for batch in inputs[:_COMPARED_INPUTS]
    ]
    before = compute_logits(trained, compared, hardware)
    if arm.peft is not None:
        last = [logits[:, -1] if logits.dim() == 3 else logits for logits in before]
        store_outputs(folder, compared, last)
    base, new_weights = task.load_base(prepared, arm.quantise)
    base = base.to(hardware.device).eval()
    times: dict[str, float | None] = {"base": None, "adapter": None, "merged": None}
    speeds: dict[str, float | None] = dict(times)

    def measure(form: str, model: nn.Module) -> None:
        model.eval()
        times[form] = median_milliseconds(
            lambda batch: compute_logits(model, [batch], hardware, exact=False), inputs, hardware.device
        )
        speeds[form] = task.generation_speed(model, prepared)

    if arm.peft is None:
        base = restore(base, new_weights, arm, task.recipe, folder).to(hardware.device).eval()
        guard("reload", _same, before, base, compared, hardware, "The reloaded model")
        measure("base", base)
    else:
        measure("base", base)
        model = restore(base, new_weights, arm, task.recipe, folder).to(hardware.device).eval()
        tolerance = TOLERANCE[arm.quantise]
        guard("reload", _same, before, model, compared, hardware, "The reloaded adapter", tolerance)
        measure("adapter", model)
        if arm.quantise:
            before, model = _on_full_weights(task, prepared, arm, folder, before, compared, hardware, guard)
        whole = merged(model)
        if whole is None:
            guard.results["merge"] = f"{arm.method_name} can't be merged"
        else:
            guard("merge", _same, before, whole, compared, hardware, "The merged model")
            measure("merged", whole)
    generates = any(speed is not None for speed in speeds.values())
    return {"latency_ms": times, "generation_tokens_per_second": speeds if generates else None}


def _on_full_weights(
    task: Task,
    prepared: Prepared,
    arm: Arm,
    folder: Path,
    quantised: list[torch.Tensor],
    inputs: list[dict[str, torch.Tensor]],
    hardware: Hardware,
    guard: Guards,
) -> tuple[list[torch.Tensor], nn.Module]:
    """A quantised arm on the weights that its base stands for, which is what it can be merged into, and its outputs.

    How far they are from the quantised model's is kept, as a share of their size: int8 rounds its inputs as well.
    """
    base, new_weights = task.load_base(prepared, arm.quantise)
    base = dequantised(base).to(hardware.device).eval()
    model = restore(base, new_weights, arm, task.recipe, folder).to(hardware.device).eval()
    found = compute_logits(model, inputs, hardware)
    guard.results["dequantised"] = max(checks.gap(a, b) for a, b in zip(quantised, found, strict=True))
    return found, model


def _same(
    first: list[torch.Tensor],
    model: nn.Module,
    inputs: list[dict[str, torch.Tensor]],
    hardware: Hardware,
    what: str,
    tolerance: float = 1e-3,
) -> float:
    second = compute_logits(model, inputs, hardware)
    said = f"{what} differs from the trained one"
    return max(checks.same_outputs(a, b, said, tolerance) for a, b in zip(first, second, strict=True))


def compute_logits(
    model: nn.Module, inputs: list[dict[str, torch.Tensor]], hardware: Hardware, *, exact: bool = True
) -> list[torch.Tensor]:
    """The logits of each input, on the CPU in fp32, the model in evaluation mode.

    exact: computed in fp32, as the weights are, whatever training computed in: rounding to bf16 would hide differences
    and make some (merged against unmerged) where there are none.
    """
    model.eval()
    with torch.no_grad(), contextlib.nullcontext() if exact else hardware.autocast():
        return [model(**{k: v.to(hardware.device) for k, v in batch.items()}).logits.float().cpu() for batch in inputs]
