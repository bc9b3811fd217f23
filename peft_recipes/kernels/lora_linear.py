"""A LoRA layer's forward and backward pass as one operation of autograd, on a base layer with the faster product.

PEFT writes `base(x) + lora_B(lora_A(x)) * scaling`: four more passes over activations of the layer's width than its
matrix products need. Here they are added where the base's product lies already. The results are the same up to
rounding; whatever is not plain LoRA (dropout, DoRA, several adapters, merged, disabled) stays PEFT's own.
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
    """Gives the LoRA layers of a model the shorter way, where their base layers have cpu_products' one."""
    for module in model.modules():
        if type(module) is Linear and onednn_linear.is_sped_up(module.base_layer):
            module.forward = functools.partial(_forward, module)


class _LoraProduct(torch.autograd.Function):
    """x [n, k], weight [m, k] frozen, bias [m] frozen or None, A [r, k], B [m, r]: what the layer gives [n, m]."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float) -> torch.Tensor:
        inner = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return onednn_linear.product(x, weight, bias).addmm_(inner, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        of_inner = (gradient @ b).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = onednn_linear.product(gradient, weight.t()).addmm_(of_inner, a)
        of_a = of_inner.t() @ x if ctx.needs_input_grad[3] else None
        of_b = (gradient.t() @ inner).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return of_x, None, None, of_a, of_b, None


def _forward(self: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = _plain_adapter(self) if not (args or kwargs) else None
    if name is None:
        return Linear.forward(self, x, *args, **kwargs)
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    weight = base.weight.t() if type(base) is Conv1D else base.weight
    ours = all(onednn_linear.takes(x, part) for part in (base.weight, a, b))
    frozen = not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
    if not (ours and frozen):
        return Linear.forward(self, x)
    rows = x.reshape(-1, x.shape[-1])
    return _LoraProduct.apply(rows, weight, base.bias, a, b, self.scaling[name]).view(*x.shape[:-1], -1)


def _plain_adapter(layer: Linear) -> str | None:
    """The one adapter that answers, if it is LoRA and nothing besides: no dropout in this pass, no variant, no bias."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
        return None
    dropout, parts = layer.lora_dropout[name], (layer.lora_A[name], layer.lora_B[name])
    drops = layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1) > 0
    simple = all(type(part) is nn.Linear and part.bias is None for part in parts)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = any(getattr(m, kind) for m in (layer.base_layer, *parts, dropout) for kind in kinds)
    return name if simple and not drops and not hooked else None
