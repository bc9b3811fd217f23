"""A LoRA layer's forward and backward pass as one autograd operation, on a base layer with oneDNN's matrix product.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling`, four passes over activations more than its matrix products need.
Here the products accumulate into the base layer's output. The results are equal up to rounding; anything but plain
LoRA (dropout, DoRA, several adapters, merged, disabled) uses PEFT's own forward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn as nn
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from peft_recipes.kernels import onednn_linear


def speed_up(model: nn.Module) -> None:
    """Replace the forward of LoRA layers whose base layers use oneDNN (`onednn_linear.speed_up`)."""
    for module in model.modules():
        if type(module) is Linear and onednn_linear.is_sped_up(module.base_layer):
            module.forward = functools.partial(_forward, module)


class _LoraProduct(torch.autograd.Function):
    """Output [n, m] of x [n, k], frozen weight [m, k], frozen bias [m] or None, A [r, k] and B [m, r]."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float) -> torch.Tensor:
        inner = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return onednn_linear.product(x, weight, bias).addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        grad_inner = (grad @ b).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = onednn_linear.product(grad, weight.t()).addmm_(grad_inner, a)
        grad_a = grad_inner.t() @ x if ctx.needs_input_grad[3] else None
        grad_b = (grad.t() @ inner).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b, None


def _forward(self: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = _plain_adapter(self) if not (args or kwargs) else None
    if name is None:
        return Linear.forward(self, x, *args, **kwargs)
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    supported = all(onednn_linear.supports(x, weight) for weight in (base.weight, a, b))
    frozen = not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
    if not (supported and frozen):
        return Linear.forward(self, x)
    weight = base.weight.t() if type(base) is Conv1D else base.weight
    flat = x.reshape(-1, x.shape[-1])
    return _LoraProduct.apply(flat, weight, base.bias, a, b, self.scaling[name]).view(*x.shape[:-1], -1)


def _plain_adapter(layer: Linear) -> str | None:
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
