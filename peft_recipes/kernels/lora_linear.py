"""A LoRA layer's forward and backward pass as one autograd operation.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling`, four passes over activations more than its matrix products need.
Here the products accumulate into the base layer's output. The results are equal up to rounding; anything but plain
LoRA (dropout, DoRA, several adapters, merged, disabled) uses PEFT's own forward. On a GPU it is off: whether it pays
there was never measured (a step of benchmarks/on_gpu.py does).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from peft_recipes.kernels import onednn_linear

Product = Callable[..., torch.Tensor]  # of a [n, k], b [m, k] and bias [m] or None: [n, m]


def speed_up(model: nn.Module, everywhere: bool = False) -> None:
    """Replace the forward of LoRA layers whose base layers use oneDNN (`onednn_linear.speed_up`).

    everywhere: of all on a linear layer that is not quantised, on any device and under autocast.
    """
    for module in model.modules():
        if type(module) is not Linear:
            continue
        base = module.base_layer
        if onednn_linear.is_sped_up(base) or (everywhere and type(base) in (nn.Linear, Conv1D)):
            module.forward = functools.partial(_forward, module, everywhere)


class _LoraProduct(torch.autograd.Function):
    """Output [n, m] of x [n, k], frozen weight [m, k], frozen bias [m] or None, A [r, k] and B [m, r], of one dtype."""

    @staticmethod
    def forward(ctx: Any, product: Product, x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float):
        inner = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling, ctx.product = scaling, product
        return product(x, weight, bias).addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        grad_inner = (grad @ b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = ctx.product(grad, weight.t()).addmm_(grad_inner, a)
        grad_a = grad_inner.t() @ x if ctx.needs_input_grad[4] else None
        grad_b = (grad.t() @ inner).mul_(ctx.scaling) if ctx.needs_input_grad[5] else None
        return None, grad_x, None, None, grad_a, grad_b, None


def _forward(self: Linear, everywhere: bool, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = plain_adapter(self) if not (args or kwargs) else None
    if name is None:
        return Linear.forward(self, x, *args, **kwargs)
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    frozen = not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
    product = _product(x, (base.weight, a, b), everywhere)
    if product is None or not frozen:
        return Linear.forward(self, x)
    weight = base.weight.t() if type(base) is Conv1D else base.weight
    tensors = (x.reshape(-1, x.shape[-1]), weight, base.bias, a, b)
    if (dtype := _autocast_dtype(x)) is not None:
        tensors = tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)
    with contextlib.nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False):
        output = _LoraProduct.apply(product, *tensors, self.scaling[name])
    return output.view(*x.shape[:-1], -1)


def _product(x: torch.Tensor, weights: tuple[torch.Tensor, ...], everywhere: bool) -> Product | None:
    """The matrix product for these tensors; None leaves them to PEFT's forward."""
    if all(onednn_linear.supports(x, weight) for weight in weights):
        return onednn_linear.product
    plain = all(type(weight) in (nn.Parameter, torch.Tensor) for weight in weights)  # no DTensor
    alike = _autocast_dtype(x) is not None or all(weight.dtype == x.dtype for weight in weights)
    return F.linear if everywhere and plain and alike and not torch.compiler.is_compiling() else None


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def plain_adapter(layer: Linear) -> str | None:
    """Return the only active adapter if it is plain LoRA: no variant, no bias, no hooks, no dropout in this pass."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
        return None
    dropout, parts = layer.lora_dropout[name], (layer.lora_A[name], layer.lora_B[name])
    drops = layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1) > 0
    plain = all(type(part) is nn.Linear and part.bias is None for part in parts)
    hook_types = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = any(getattr(module, hooks) for module in (layer.base_layer, *parts, dropout) for hooks in hook_types)
    return name if plain and not drops and not hooked else None
