"""Linear layers on an AMD CPU: their fp32 matrix products by oneDNN, which torch brings along, instead of by MKL.

On such a CPU oneDNN is the faster of the two (`python benchmarks/cpu_products.py` says by how much); torch itself asks
it for products in bf16 only. The results are the same up to rounding. Not under torch.compile, which chooses itself;
`torch.backends.mkldnn.enabled = False` switches it off.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

LEAST_WEIGHTS = 2**16  # below this a call of ours costs more than it saves
_LEAST_ROWS = 16  # a few rows are read faster than they are multiplied


def speed_up(model: nn.Module) -> None:
    """Gives the model's large linear layers the faster product, where this machine has it. Their types, weights and
    names stay: some of PEFT's methods take nothing but nn.Linear itself."""
    if not pays():
        return
    for module in model.modules():
        if type(module) in _FORWARD and module.weight.numel() >= LEAST_WEIGHTS:
            # It holds the module, so that a copy of it, deep or pickled, computes with its own weights.
            module.forward = functools.partial(_FORWARD[type(module)], module)


def is_sped_up(layer: nn.Module) -> bool:
    """Whether `speed_up` gave this layer the faster product."""
    return getattr(layer.__dict__.get("forward"), "func", None) in _FORWARD.values()


@functools.cache
def pays() -> bool:
    """Whether models compute on an AMD CPU, and oneDNN's product is there and right. The same for every run here."""
    if not is_amd_cpu() or torch.cuda.is_available() or torch.backends.mps.is_available():
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(-2, 3, 12).view(4, 3)
    try:  # inductor's entry, which is no promise of torch's
        return torch.allclose(product(a, b), a @ b.t()) and torch.allclose(product(b.t(), b.t()), b.t() @ b)
    except (RuntimeError, AttributeError, TypeError):
        return False


def is_amd_cpu() -> bool:
    """Whether the processor is an AMD one, as Linux reports it."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text(errors="replace")


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[n, m] = a [n, k] times b [m, k] transposed, plus bias [m]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """x [n, k], weight [m, k], bias [m] or None: what F.linear gives, with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            product(gradient, weight.t()) if wanted[0] else None,
            gradient.t() @ x if wanted[1] else None,  # oneDNN is not faster here, and wants both copied first
            gradient.sum(0) if wanted[2] else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear, by oneDNN where that is for it."""
    if not takes(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _Product.apply(rows, weight, bias).view(*x.shape[:-1], -1)


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product is for oneDNN: of plain fp32 tensors on the CPU, with more than a few rows."""
    plain = type(x) is torch.Tensor and type(weight) in (nn.Parameter, torch.Tensor)  # no DTensor, nothing quantised
    return (
        plain
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() >= _LEAST_ROWS * x.shape[-1]
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _linear_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return linear(input, self.weight, self.bias)


def _conv1d_forward(self: Conv1D, x: torch.Tensor) -> torch.Tensor:
    """GPT-2's linear layer, whose weight lies the other way round."""
    return linear(x, self.weight.t(), self.bias)


_FORWARD = {nn.Linear: _linear_forward, Conv1D: _conv1d_forward}
