"""Checks after saving: the checkpoint, reloaded on a fresh base, gives the same logits; latency of each variant.

Nothing here stops a run: its weights and figures are stored before, and a failure becomes a failed check.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from peft_recipes.arms.merge import merged
from peft_recipes.guards import checks
from peft_recipes.guards.runner import NOT_RUN
from peft_recipes.measuring.latency import median_milliseconds
from peft_recipes.models.quantisation import TOLERANCE, dequantised
from peft_recipes.runs.outputs import store_outputs
from peft_recipes.training.save import restore

if TYPE_CHECKING:
    import torch.nn as nn

    from peft_recipes.hardware.device import Hardware
    from peft_recipes.training.setup import Setup

Batches = list[dict[str, torch.Tensor]]

TIMED_INPUTS = 20
_COMPARED_INPUTS = 2  # stored with the adapter, for `peft-recipes check`
_COMPARED_TOKENS = 64  # of each input: enough to tell models apart, and few enough to keep the guard cheap


def verify(setup: Setup, trained: nn.Module) -> dict[str, Any]:
    """Reload the checkpoint on a fresh base, compare its logits with the trained model's, and time each variant.

    Returns latency_ms and generation_tokens_per_second, each for base, adapter and merged, None where a variant does
    not exist or could not be measured. The largest differences, as shares of the logits' size, go into the guard's
    results, and so does whatever fails: a run that is trained and saved is kept.
    """
    arm, guard, hardware = setup.arm, setup.guard, setup.hardware
    speeds, model = _Speeds(setup), None
    if arm.peft is not None:
        guard.results["merge"] = "skipped" if "merge" in guard.skipped else f"{NOT_RUN}: the reload failed"
    with guard.recorded("reload"):
        compared, logits = _trained_outputs(setup, trained, speeds.inputs)
        base, new_weights = setup.task.load_base(setup.prepared, arm.quantise)
        base = base.to(hardware.device).eval()
        if arm.peft is not None:
            speeds.measure("base", base)
        model = _restored(setup, base, new_weights)
        speeds.measure("base" if arm.peft is None else "adapter", model)
        what = "The reloaded model" if arm.peft is None else "The reloaded adapter"
        guard("reload", _compare, logits, model, compared, hardware, what, TOLERANCE[arm.quantise])
        if arm.peft is not None:
            with guard.recorded("merge"):
                _verify_merged(setup, model, compared, logits, speeds)
    return speeds.figures()


class _Speeds:
    """Latency and generation speed of the base, the adapter and the merged model, each measured on the same inputs."""

    def __init__(self, setup: Setup):
        self.setup, self.inputs = setup, setup.task.inputs(setup.prepared, TIMED_INPUTS)
        self.latency: dict[str, float | None] = dict.fromkeys(("base", "adapter", "merged"))
        self.generation: dict[str, float | None] = dict(self.latency)

    def measure(self, variant: str, model: nn.Module) -> None:
        """Time one variant. A failure is recorded, and its figure stays None."""
        setup, hardware = self.setup, self.setup.hardware
        model.eval()
        with setup.guard.recorded("latency"):
            self.latency[variant] = median_milliseconds(
                lambda batch: compute_logits(model, [batch], hardware, exact=False), self.inputs, hardware.device
            )
        with setup.guard.recorded("generation"):
            self.generation[variant] = setup.task.generation_speed(model, setup.prepared)

    def figures(self) -> dict[str, Any]:
        """The two entries of run.json."""
        generates = any(speed is not None for speed in self.generation.values())
        return {"latency_ms": self.latency, "generation_tokens_per_second": self.generation if generates else None}


def _trained_outputs(setup: Setup, trained: nn.Module, inputs: Batches) -> tuple[Batches, list[torch.Tensor]]:
    """The inputs that outputs are compared on, and the trained model's logits; stored with an adapter."""
    compared = [
        {name: tensor[:, :_COMPARED_TOKENS] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}
        for batch in inputs[:_COMPARED_INPUTS]
    ]
    logits = compute_logits(trained, compared, setup.hardware)
    if setup.arm.peft is not None:
        last = [each[:, -1] if each.dim() == 3 else each for each in logits]
        with setup.guard.recorded("outputs"):
            store_outputs(setup.run.folder, compared, last)
    return compared, logits


def _verify_merged(
    setup: Setup, model: nn.Module, compared: Batches, logits: list[torch.Tensor], speeds: _Speeds
) -> None:
    """Merge the reloaded adapter, compare its logits with the trained model's, and time it."""
    guard, hardware = setup.guard, setup.hardware
    if setup.arm.quantise:
        model = _dequantised(setup)
        quantised, logits = logits, compute_logits(model, compared, hardware)
        guard.results["dequantised"] = max(checks.gap(a, b) for a, b in zip(quantised, logits, strict=True))
    merged_model = merged(model)
    if merged_model is None:
        guard.results["merge"] = f"{setup.arm.method_name} can't be merged"
        return
    guard("merge", _compare, logits, merged_model, compared, hardware, "The merged model")
    speeds.measure("merged", merged_model)


def _restored(setup: Setup, base: nn.Module, new_weights: list[str]) -> nn.Module:
    model = restore(base, new_weights, setup.arm, setup.recipe, setup.run.folder)
    return model.to(setup.hardware.device).eval()


def _dequantised(setup: Setup) -> nn.Module:
    """The saved adapter on the dequantised base, into which it can be merged.

    Its outputs differ from the quantised model's, since int8 rounds activations as well.
    """
    base, new_weights = setup.task.load_base(setup.prepared, setup.quantise)
    return _restored(setup, dequantised(base).to(setup.hardware.device).eval(), new_weights)


def _compare(
    expected: list[torch.Tensor],
    model: nn.Module,
    inputs: Batches,
    hardware: Hardware,
    what: str,
    tolerance: float = 1e-3,
) -> float:
    """The largest difference from the expected logits, as a share of their size. Raises beyond the tolerance."""
    logits, message = compute_logits(model, inputs, hardware), f"{what} differs from the trained one"
    return max(checks.same_outputs(a, b, message, tolerance) for a, b in zip(expected, logits, strict=True))


def compute_logits(model: nn.Module, inputs: Batches, hardware: Hardware, *, exact: bool = True) -> list[torch.Tensor]:
    """Compute the logits of each input in evaluation mode; return them on the CPU in fp32.

    exact: compute in fp32, whatever training computed in: rounding to bf16 would hide differences, and make some
    (merged compared with unmerged) where there are none.
    """
    model.eval()
    with torch.no_grad(), contextlib.nullcontext() if exact else hardware.autocast():
        return [model(**{k: v.to(hardware.device) for k, v in batch.items()}).logits.float().cpu() for batch in inputs]
