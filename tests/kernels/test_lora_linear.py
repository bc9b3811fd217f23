"""LoRA's layer in one autograd operation on any device: equal to PEFT's, in fp32 and under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_recipes.kernels import lora_linear


def adapted(kind: type = nn.Linear, **options) -> nn.Module:
    """Two layers with a LoRA that is not zero; the first one's input needs no gradient."""
    torch.manual_seed(0)
    layers = [kind(24, 40), nn.Tanh(), kind(40, 24)] if kind is nn.Linear else [kind(40, 24), nn.Tanh(), kind(24, 40)]
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["0", "2"], **options)
    config.fan_in_fan_out = kind is Conv1D
    return get_peft_model(nn.Sequential(*layers), config)


@pytest.fixture
def calls(monkeypatch):
    calls, apply = [], lora_linear._LoraProduct.apply
    monkeypatch.setattr(lora_linear._LoraProduct, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


def output_and_gradients(model, x, dtype):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(x)
    output.float().sin().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 4e-2)])
def test_output_and_gradients_equal_pefts_in_value_and_dtype(kind, dtype, tolerance, calls):
    model, x = adapted(kind), torch.randn(2, 9, 24)
    fast = copy.deepcopy(model)
    lora_linear.speed_up(fast, everywhere=True)
    theirs, ours = (output_and_gradients(each, x, dtype) for each in (model, fast))
    assert len(calls) == 2 and theirs.keys() == ours.keys() and len(ours) == 6
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        scale = float(value.abs().max())
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance * scale, msg=name)


def test_what_a_gpu_computes_is_pefts_own_unless_it_is_asked_for(calls):
    model = adapted()
    lora_linear.speed_up(model)  # this base does not use oneDNN's product, as none does on a GPU
    model(torch.randn(20, 24))
    assert not calls and not any("forward" in vars(m) for m in model.modules() if type(m) is Linear)


def test_anything_but_plain_lora_of_one_dtype_is_left_to_peft(calls):
    x = torch.randn(20, 24)
    for options in ({"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}):
        model = adapted(**options)
        lora_linear.speed_up(model, everywhere=True)
        assert model(x).shape == (20, 24) and not calls, options
    model = adapted()
    lora_linear.speed_up(model, everywhere=True)
    model.base_model.model[0].base_layer.bfloat16()  # its output is bf16, and so its LoRA's is cast by PEFT
    model.base_model.model[2].base_layer.weight.requires_grad_(True)
    assert model.base_model.model[0](x.bfloat16()).dtype == torch.bfloat16
    model.base_model.model[2](torch.randn(20, 40)).sum().backward()
    assert not calls and model.base_model.model[2].base_layer.weight.grad is not None
