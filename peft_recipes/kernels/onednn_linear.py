"""Linear layers on AMD CPUs: fp32 matrix products by oneDNN, which is part of torch, instead of MKL.

oneDNN is the faster one there (`python benchmarks/cpu_products.py` measures it); torch itself uses it for bf16 only.
The results are equal up to rounding. Not used under torch.compile; `torch.backends.mkldnn.enabled = False` turns it
off.
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

LEAST_WEIGHTS = 2**16  # for smaller layers the overhead is larger than the gain
_LEAST_POSITIONS = 16  # for fewer, reading the weights takes longer than multiplying


def speed_up(model: nn.Module) -> None:
    """Let the model's large linear layers use oneDNN where `pays()`.

    Their types, weights and names do not change: some PEFT methods accept only nn.Linear itself.
    """
    if not pays():
        return
    for module in model.modules():
        if type(module) in _FORWARD and module.weight.numel() >= LEAST_WEIGHTS:
            # bound to the module, so that a copy of it (deepcopy, pickle) uses its own weights
            module.forward = functools.partial(_FORWARD[type(module)], module)


def is_sped_up(layer: nn.Module) -> bool:
    """Whether `speed_up` replaced the layer's forward."""
    return getattr(layer.__dict__.get("forward"), "func", None) in _FORWARD.values()


@functools.cache
def pays() -> bool:
    """Whether models run on an AMD CPU here and oneDNN's product exists and is correct; checked once per process."""
    if not is_amd_cpu() or torch.cuda.is_available() or torch.backends.mps.is_available():
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(-2, 3, 12).view(4, 3)
    try:  # a private operator of torch's inductor
        return torch.allclose(product(a, b), a @ b.t()) and torch.allclose(product(b.t(), b.t()), b.t() @ b)
    except (RuntimeError, AttributeError, TypeError):
        return False


def is_amd_cpu() -> bool:
    """Whether Linux reports an AMD processor."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text(errors="replace")


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute a [n, k] times b [m, k] transposed, plus bias [m]: [n, m]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """F.linear and its gradients for x [n, k], weight [m, k], bias [m] or None."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if needed[0] else None,
            grad.t() @ x if needed[1] else None,  # oneDNN is not faster here, and would copy both first
            grad.sum(0) if needed[2] else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear, with oneDNN if it supports the tensors."""
    if not supports(x, weight):
        return F.linear(x, weight, bias)
    return _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN computes this product: plain fp32 tensors on the CPU, with enough positions."""
    plain = type(x) is torch.Tensor and type(weight) in (nn.Parameter, torch.Tensor)  # no DTensor, nothing quantised
    return (
        plain
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() >= _LEAST_POSITIONS * x.shape[-1]
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _linear_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return linear(input, self.weight, self.bias)


def _conv1d_forward(self: Conv1D, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight.t(), self.bias)  # Conv1D stores (in, out)


_FORWARD = {nn.Linear: _linear_forward, Conv1D: _conv1d_forward}
